"""Xet's storage protocol, as far as uploads need it: xorbs come, a shard makes files of them, LFS objects remain.

Protocol: https://huggingface.co/docs/xet/api. huggingface_hub 2 with hf_xet sends large files in no other way. What
is not here (deduplication over all files, upload grants, shards v2, reads) is answered with 404, and clients do
without. Addresses hold the repository's epoch, so that no client counts on what is here no more.
"""

from __future__ import annotations

from quantmill.hub.server import names
from quantmill.hub.server.answers import Answer, as_json
from quantmill.hub.server.refusal import Refusal, no_repository
from quantmill.hub.server.repository import Repository
from quantmill.hub.server.routing import Call, Route, route
from quantmill.hub.server.shard import LONGEST as LONGEST_SHARD
from quantmill.hub.server.shard import read_shard
from quantmill.hub.server.xet import Xorbs
from quantmill.hub.server.xorb import LONGEST as LONGEST_XORB

DEED = "xet"
FOOTER = 4 << 20  # bytes that heads and a footer may add to a xorb


def write_token(call: Call) -> Answer:
    """Where to send xorbs to, and a pass for that. `lfsUrl`: who can had better send files there, whole."""
    repository = call.store.find(call.name, call.account, write=True)
    epoch = Xorbs.of(repository).epoch()
    token, expires = call.store.links.pass_for(DEED, call.name, epoch)
    url = f"{call.base}/api/xet/{call.name}/{epoch}"
    headers = {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": token, "X-Xet-Token-Expiration": str(expires)}
    answer = {"casUrl": url, "accessToken": token, "exp": expires}
    return as_json({**answer, "lfsUrl": f"{call.base}/{call.name}.git/info/lfs"}, headers=headers)


def no_reading(call: Call) -> Answer:
    """Files are handed out whole."""
    if call.parts["owner"] in names.RESERVED:
        raise no_repository(call.name)
    raise Refusal(404, "files of this hub come by plain HTTP: there is no xet storage to read from")


def take_xorb(call: Call) -> Answer:
    """Unpack a xorb; a shard names it by its hash. Raises Refusal 400, 507."""
    xorbs = Xorbs.of(_repository(call))
    return as_json({"was_inserted": xorbs.take(names.object_id(call.parts["hash"]), call.body)})


def take_shard(call: Call) -> Answer:
    """Every file that it describes is here, whole and proved, before the answer goes out."""
    xorbs = Xorbs.of(_repository(call))
    for assembly in read_shard(call.body.read()):
        xorbs.assemble(assembly)
    return as_json({"result": 1})


def _repository(call: Call) -> Repository:
    """The repository that the pass sent along is for. Raises Refusal: 401, 404."""
    epoch = call.parts["epoch"]
    name = names.repository_name(call.parts["owner"], call.parts["name"])
    if not call.store.links.knows(call.headers.get("authorization", ""), DEED, name, epoch):
        raise Refusal(401, "this is no pass for that, or too old: ask for a new one")
    folder = call.store.folder(name)
    if not folder.is_dir() or Xorbs.of(Repository(folder)).epoch() != epoch:
        raise Refusal(404, "what was here is gone: send the files again from the beginning")
    return Repository(folder)


_MODEL, _CAS = "/api/models/{owner}/{name}", "/api/xet/{owner}/{name}/{epoch}"
ROUTES: tuple[Route, ...] = (
    route(f"GET {_MODEL}/xet-write-token/{{revision}}", write_token),
    route(f"GET {_MODEL}/xet-read-token/{{revision}}", no_reading),
    route(f"POST {_CAS}/v1/xorbs/default/{{hash}}", take_xorb, LONGEST_XORB + FOOTER, sealed=True),
    route(f"POST {_CAS}/v1/shards", take_shard, LONGEST_SHARD, sealed=True),
)

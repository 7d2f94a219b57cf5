"""One answer on its way: its tokens, how far they are in the cache, its pages, its sampler."""

from __future__ import annotations

from quantmill.runtime.engine_types import Request
from quantmill.runtime.interface import PAGE, Floats
from quantmill.runtime.pages import Key, PagePool, page_keys, pages_for
from quantmill.runtime.sampling import SamplerState


class Sequence:
    """Mutable, the engine's own. `order` is its place in the line of all answers that ever came."""

    def __init__(self, request: Request, choice: int, order: int, limit: int) -> None:
        self.request, self.choice, self.order = request, choice, order
        self.tokens = list(request.prompt)  # the prompt and what was answered so far
        self.limit = limit  # tokens at most, prompt included
        self.state = SamplerState(request.params, request.prompt, choice)
        self.matcher = request.matcher() if request.matcher is not None else None
        self.computed = 0  # positions whose keys and values are in the cache
        self.pages: list[int] = []
        self.named = 0  # pages whose content has a name in the pool
        self.keys: list[Key] = []
        self.cached = 0  # prompt tokens taken over at the first admission
        self.begun = False
        self.finished = False
        self.scored = 1  # prompt tokens whose log probability was reported; the first has none
        self.logprob = 0.0
        self.hidden: Floats | None = None  # the sum of hidden states so far
        self.leader: Sequence | None = (
            None  # the first answer to the same prompt, whose pages this one shares
        )

    @property
    def prompt_tokens(self) -> int:
        return len(self.request.prompt)

    @property
    def answer_tokens(self) -> int:
        return len(self.tokens) - self.prompt_tokens

    @property
    def left(self) -> int:
        """Tokens to compute before the next one can be drawn."""
        return len(self.tokens) - self.computed

    def missing(self, count: int) -> int:
        """Pages that the next `count` tokens need and that are not there yet."""
        return max(0, pages_for(self.computed + count) - len(self.pages))

    @property
    def scoring(self) -> bool:
        """In a prompt whose own log probabilities are wanted: nothing of it can be taken over."""
        return self.request.score_prompt is not None and self.computed < self.prompt_tokens

    @property
    def ready(self) -> bool:
        """False while the first answer to the same prompt is still at the prompt: its pages are worth waiting
        for."""
        leader = self.leader
        return leader is None or leader.finished or leader.computed >= leader.prompt_tokens

    def take_over(self, pool: PagePool, step: int = 1) -> None:
        """Start from what the pool still knows of these tokens, in steps of so many pages. The last token is
        always computed: its logits are what is wanted."""
        if self.scoring or self.request.embed:
            return
        self.keys = page_keys(self.tokens[: len(self.tokens) - 1], self.keys)
        self.pages = pool.match(self.keys, step)
        self.named = len(self.pages)
        self.computed = len(self.pages) * PAGE
        if not self.begun:
            self.cached = self.computed

    def grow(self, count: int, pool: PagePool) -> int:
        """Take the pages that the next `count` tokens need -> the tokens that there are pages for."""
        if missing := self.missing(count):
            self.pages += pool.take(min(missing, pool.available))
        return min(count, len(self.pages) * PAGE - self.computed)

    def advance(self, count: int, pool: PagePool, named: int) -> None:
        """`count` tokens more are in the cache: name full pages of the first `named` positions, let go what no
        window sees."""
        self.computed += count
        full = min(self.computed, named) // PAGE
        if full > self.named:
            self.keys = page_keys(self.tokens[: full * PAGE], self.keys)
            for i in range(self.named, full):
                pool.name(self.pages[i], self.keys[i])
            self.named = full
        self.pages = pool.passed(self.pages, self.computed)

    def put_aside(self, pool: PagePool) -> None:
        """Give all pages back. Tokens, sampler and grammar stay: nothing that was answered is lost."""
        pool.release(self.pages)
        self.pages, self.computed, self.named = [], 0, 0
        self.hidden = None

"""LangChain's own client, unchanged."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import pytest

from serve.conftest import Running

pytest.importorskip(
    "langchain_openai", reason="langchain-openai is not installed: pip install quantmill[dev]"
)

from langchain_core.messages import HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from openai import OpenAI


@pytest.fixture(scope="module")
def chat(toy: Running) -> Iterator[ChatOpenAI]:
    made = ChatOpenAI(
        base_url=f"{toy.url}/v1", api_key="none", model="toy", max_tokens=10, seed=2, max_retries=0
    )
    yield made
    made.root_client.close()


def test_invoke_and_stream(chat: ChatOpenAI) -> None:
    messages = [SystemMessage("be brief"), HumanMessage("hello")]
    whole = chat.invoke(messages)
    assert whole.content
    assert whole.usage_metadata is not None
    assert whole.usage_metadata["output_tokens"] == 10
    assert "".join(str(c.content) for c in chat.stream(messages)) == whole.content


def test_tools(chat: ChatOpenAI) -> None:
    def weather(city: Literal["Paris", "Rome"]) -> str:
        """The weather of a city."""
        return city

    made = chat.bind_tools([weather], tool_choice="weather").invoke("hello", max_tokens=400)
    assert made.tool_calls[0]["name"] == "weather", made
    assert made.tool_calls[0]["args"]["city"] in ("Paris", "Rome")


def test_embeddings(toy: Running) -> None:
    with OpenAI(base_url=f"{toy.url}/v1", api_key="none") as client:
        made = OpenAIEmbeddings(
            model="toy",
            client=client.embeddings,
            async_client=client.embeddings,
            check_embedding_ctx_length=False,
        )
        assert len(made.embed_query("hello")) == 16
        assert len(made.embed_documents(["a", "b"])) == 2

"""/tokenize and /detokenize: there and back, and the same ids that a generation would have."""

from __future__ import annotations

import httpx

from tandem.core.blocks import token_ids
from tests.integration.frontend.conftest import MODEL, Site

HELLO = [{"role": "user", "content": "Grüße <|im_end|>"}]


async def test_there_and_back(site: Site) -> None:
    async with httpx.AsyncClient(base_url=site.url) as client:
        text = "Grüße 👩‍👩‍👧, <|im_end|> 你好"
        answer = (await client.post("/tokenize", json={"model": MODEL, "prompt": text})).json()
        assert answer["tokens"] == site.ids(text)
        assert (answer["count"], answer["max_model_len"]) == (len(site.ids(text)), 512)
        assert answer["token_strs"] is None
        back = await client.post("/detokenize", json={"model": MODEL, "tokens": answer["tokens"]})
        assert back.json() == {"prompt": text}
        answer = await client.post("/tokenize", json={"model": MODEL, "prompt": "abc", "return_token_strs": True})
        assert "".join(answer.json()["token_strs"]) == "abc"


async def test_messages_come_to_what_a_chat_comes_to(site: Site) -> None:
    site.answer("x")
    await site.client.chat.completions.create(model=MODEL, messages=HELLO)
    async with httpx.AsyncClient(base_url=site.url) as client:
        answer = (await client.post("/tokenize", json={"model": MODEL, "messages": HELLO})).json()
    assert answer["tokens"] == list(token_ids(site.cluster.submits[0].prompt))


async def test_refused(site: Site) -> None:
    async with httpx.AsyncClient(base_url=site.url) as client:
        for path, body, status, param in [
            ("/tokenize", {"model": MODEL}, 400, "prompt"),
            ("/tokenize", {"model": MODEL, "prompt": "a", "messages": HELLO}, 400, "prompt"),
            ("/tokenize", {"model": MODEL, "prompt": "a", "colour": 1}, 400, "colour"),
            ("/tokenize", {"model": "other", "prompt": "a"}, 404, "model"),
            ("/tokenize", {"model": MODEL, "prompt": "a b " * 100_000}, 400, "prompt"),
            ("/detokenize", {"model": MODEL, "tokens": [4_000_000]}, 400, "tokens"),
            ("/detokenize", {"model": MODEL, "tokens": [1] * 513}, 400, "tokens"),
            ("/detokenize", {"model": MODEL, "tokens": [-1]}, 400, "tokens[0]"),
        ]:
            response = await client.post(path, json=body)
            assert (response.status_code, response.json()["error"]["param"]) == (status, param), body
        assert (await client.get("/tokenize")).status_code == 405

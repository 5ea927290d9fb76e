"""`tandem explain "prompt"`: which plan the router would choose now, and every term of every candidate's score."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from typing import Any

import grpc

from tandem.adapters import settings
from tandem.cli import control, rundir
from tandem.cli.chat import ChatSettings, Endpoint
from tandem.cli.status import table
from tandem.core.blocks import root_hash, sequence_hashes, token_bytes
from tandem.errors import ConfigError, InvalidRequest, NoLeader
from tandem.v1 import router_pb2, router_pb2_grpc


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("prompt", nargs="?", help="as a user's message; its tokens and cached blocks count")
    add("--raw", action="store_true", help="the prompt as it is, without the chat template")
    add("--tokens", type=int, metavar="N", help="instead of a prompt: one of N tokens that nobody has cached")
    add("--model", default="", help="default: the only one")
    add("--tenant", default="default", metavar="NAME", help="who would ask")
    add("--class", dest="request_class", default="", metavar="NAME", help="default: the tenant's")
    add("--max-tokens", type=int, default=256, metavar="N", help="that may be produced (default: 256)")
    add("--url", default="", help="of a frontend that tokenises; default: the cluster's")
    add("--json", action="store_true", help="for programs")
    control.add_where(parser)


def run(args: argparse.Namespace) -> int:
    if (args.prompt is None) == (args.tokens is None):
        raise ConfigError("say a prompt, or --tokens N", param="prompt")
    if (args.tokens is not None and args.tokens < 1) or args.max_tokens < 1:
        raise ConfigError("--tokens and --max-tokens must be positive", param="tokens")
    addresses = control.routers(args)
    model = control.chosen_model(args.model, addresses)
    router = control.leader_of(model, addresses)
    request = router_pb2.ExplainRequest(
        model=model, tenant=args.tenant, request_class=args.request_class, max_tokens=args.max_tokens
    )
    if args.tokens is not None:
        request.isl_tokens = args.tokens
    else:
        tokens = _tokens(args, model)
        request.isl_tokens = len(tokens)
        request.block_hashes = _hashes(tokens, model, args.tenant, router)
    answer = _explain(router, request)
    print(as_json(request, answer) if args.json else "\n".join(as_text(request, answer)))
    return 0


def _tokens(args: argparse.Namespace, model: str) -> list[int]:
    """As a frontend would have it. InvalidRequest is the frontend's own."""
    url = args.url or rundir.find_cluster(args.cluster).http[0]
    key = settings.load(ChatSettings, shared=True).api_key
    text = {"prompt": args.prompt} if args.raw else {"messages": [{"role": "user", "content": args.prompt}]}
    with Endpoint(url, key).request("POST", "/tokenize", {"model": model, **text}) as response:
        found: list[int] = json.loads(response.read())["tokens"]
    return found


def _hashes(tokens: Sequence[int], model: str, tenant: str, router: str) -> bytes:
    """Tenants' blocks have nothing in common where tenants are declared."""
    sizes = {state.info.block_size for state in control.workers(router, model)}
    if not sizes:
        return b""
    with grpc.insecure_channel(router) as channel:
        stub = router_pb2_grpc.RouterServiceStub(channel)
        try:
            policy = stub.GetPolicy(router_pb2.GetPolicyRequest(model=model), timeout=control.CALL_S)
        except grpc.RpcError as error:
            raise NoLeader(f"the router at {router} does not answer: {control.said(error)}") from None
    salt = tenant if json.loads(policy.tenants_json or "[]") else ""
    return sequence_hashes(token_bytes(tokens), max(sizes), root_hash(model, "", salt)).tobytes()


def _explain(router: str, request: router_pb2.ExplainRequest) -> router_pb2.ExplainResponse:
    with grpc.insecure_channel(router) as channel:
        stub = router_pb2_grpc.RouterServiceStub(channel)
        try:
            answer: router_pb2.ExplainResponse = stub.Explain(request, timeout=control.CALL_S)
        except grpc.RpcError as error:
            raise InvalidRequest(f"the router at {router}: {control.said(error)}") from None
    return answer


def as_json(request: router_pb2.ExplainRequest, answer: router_pb2.ExplainResponse) -> str:
    rows: list[dict[str, Any]] = [
        {
            "decode_worker": one.decode_worker,
            "prefill_worker": one.prefill_worker or None,
            "chosen": one.chosen,
            "excluded": one.excluded or None,
            "score": one.score,
            "terms": {term.name: term.value for term in one.terms},
        }
        for one in answer.candidates
    ]
    content = {"prompt_tokens": request.isl_tokens, "summary": answer.summary, "candidates": rows}
    return json.dumps(content, indent=1)


def as_text(request: router_pb2.ExplainRequest, answer: router_pb2.ExplainResponse) -> list[str]:
    """The chosen one first, then by score; those that were taken out last."""
    names = list(dict.fromkeys(term.name for one in answer.candidates for term in one.terms))
    taken = sorted((c for c in answer.candidates if not c.excluded), key=lambda c: (not c.chosen, c.score))
    out = [c for c in answer.candidates if c.excluded]
    lines = [f"{request.isl_tokens} prompt tokens: {answer.summary}", ""]
    if taken:
        lines += table(("", "decode", "prefill", "score", *names), (_row(one, names) for one in taken))
    if out:
        lines += ["", *table(("decode", "prefill", "taken out, because"), (_where(one) for one in out))]
    return lines


def _row(one: router_pb2.Candidate, names: Iterable[str]) -> tuple[object, ...]:
    terms = {term.name: f"{term.value:.4g}" for term in one.terms}
    where = (one.decode_worker, one.prefill_worker or "by itself")
    return ("*" if one.chosen else "", *where, f"{one.score:.4g}", *(terms.get(name, "-") for name in names))


def _where(one: router_pb2.Candidate) -> tuple[str, str, str]:
    return one.decode_worker, one.prefill_worker or "by itself", one.excluded

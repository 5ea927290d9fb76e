"""`tandem profile`: measures this machine's engine, and writes the timing profile that fits it.

One engine runs alone, as a worker would run it. Prompts of several lengths, with and without cached prefixes, batches
of decodes at several contexts, and prompts beside running decodes; the engine's own step timings are what is fitted.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median

from tandem.adapters import deployment as deployment_file
from tandem.adapters.clock import monotonic
from tandem.adapters.deployment import Deployment, Model, Pool, PoolRole
from tandem.cli import deployments, preflight
from tandem.cli.status import table
from tandem.core.types import SamplingParams, StepTiming
from tandem.engine.factory import make_engine
from tandem.engine.protocol import Engine, EngineConfig, EngineInfo, EngineOutput, EngineRequest
from tandem.enginemodel.fit import fit
from tandem.enginemodel.profile import step_s
from tandem.errors import ConfigError, EngineFailed
from tandem.wire import profile_file

#: Tokens that any vocabulary has.
_TOKENS = range(300, 20_000)
#: Decoded per sequence and measurement.
_OUTPUT = 16
#: No single measurement takes longer; then the engine hangs.
_ONE_S = 300.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("-f", "--file", metavar="FILE", help="deployment file; without it: SmolLM2 as `tandem up` starts it")
    add("--model", metavar="NAME", help="of the deployment's models (default: the first)")
    add("--pool", metavar="NAME", help="of the model's pools (default: the last, which decodes)")
    add("--engine", choices=("vllm", "sim"), help="run the pool on this engine")
    add("--prompts", type=_numbers, metavar="N,...", help="prompt lengths, tokens")
    add("--batches", type=_numbers, default=(1, 2, 4, 8, 16), metavar="N,...", help="sequences that decode together")
    add("--contexts", type=_numbers, metavar="N,...", help="prompt tokens that these have, and cached prefixes")
    add("--repeat", type=int, default=3, metavar="N", help="times that each point is measured (default: 3)")
    add("--name", metavar="NAME", help="of the profile (default: engine and model)")
    add("-o", "--output", default="profile.json", metavar="FILE", help="default: profile.json")
    add("--seed", type=int, default=0, help="of the prompts")
    add("--quiet", action="store_true", help="no progress")


def _numbers(text: str) -> tuple[int, ...]:
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or min(found) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers like 1,2,4")
    return found


def run(args: argparse.Namespace) -> int:
    if args.repeat < 1:
        raise ConfigError("--repeat must be at least 1", param="repeat")
    base = deployment_file.read(args.file) if args.file else deployments.default()
    if args.engine:
        base = deployments.overridden(base, deployments.Overrides(engine=args.engine))
    folder = Path(args.file).expanduser().resolve().parent if args.file else Path.cwd()
    model, pool = _chosen(base, args.model, args.pool)
    one = base.model_copy(update={"models": (model.model_copy(update={"pools": (pool,)}),)})
    preflight.check_engines(one)
    path = preflight.find_models(one, folder, lambda line: print(line, file=sys.stderr))[model.name]
    with tempfile.TemporaryDirectory(prefix="tandem-") as run_dir:
        config = _config(model.model_copy(update={"path": str(path)}), pool, run_dir)
        info, points = asyncio.run(_measured(config, args))
    name = args.name or f"{info.engine}-{Path(model.name).name}".lower()
    return _finish(name, model, info, points, Path(args.output).expanduser())


def _chosen(base: Deployment, model_name: str | None, pool_name: str | None) -> tuple[Model, Pool]:
    model = base.model(model_name) if model_name else base.models[0]
    pools = {pool.pool_name: pool for pool in model.pools}
    if pool_name and pool_name not in pools:
        raise ConfigError(f"model {model.name!r} has no pool {pool_name!r}; it has: {', '.join(pools)}", param="pool")
    return model, pools[pool_name] if pool_name else model.pools[-1]


def _config(model: Model, pool: Pool, run_dir: str) -> EngineConfig:
    return EngineConfig(
        engine=pool.engine,
        model_path=model.path,
        served_model=model.name,
        worker_id="profile",
        run_dir=run_dir,
        disaggregated=pool.role is not PoolRole.AGGREGATED,
        max_model_len=model.max_model_len,
        block_size=model.block_size,
        dtype=model.dtype,
        kv_lease_s=model.kv_lease_s,
        kv_host="127.0.0.1",
        kv_port=0,
        args=dict(pool.engine_args),
    )


# -- measuring ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Point:
    """One kind of step, and how long it took each time."""

    tokens: int
    context: int
    sequences: int
    kv_tokens: int
    steps: list[StepTiming] = field(default_factory=list)

    def __str__(self) -> str:
        decodes = f"{self.sequences} decodes reading {self.kv_tokens} tokens" if self.sequences else ""
        if not self.tokens:
            return decodes
        before = round((self.context / self.tokens) - (self.tokens - 1) / 2)
        prompt = f"{self.tokens} prompt tokens after {before}"
        return f"{prompt}, beside {decodes}" if decodes else prompt


@dataclass(frozen=True, slots=True)
class Run:
    """Requests to measure together: prompts (shared head, then their own), tokens to produce, and a late-comer."""

    what: str
    shared: int
    own: int
    count: int = 1
    output: int = 1
    late: int = 0  # tokens of a prompt that comes while the others decode


async def _measured(config: EngineConfig, args: argparse.Namespace) -> tuple[EngineInfo, list[Point]]:
    engine = make_engine(config)
    say: Callable[[str], None] = (lambda text: None) if args.quiet else _progress
    say("starting the engine")
    await engine.start(lambda events: None)
    try:
        info = engine.info
        runs = list(_runs(info, args))
        bench = Bench(engine, random.Random(args.seed))
        await bench.measure(Run("warm-up", 64, 64, 2, 8))
        steps: list[StepTiming] = []
        began = monotonic()
        for done, run_ in enumerate(runs):
            say(f"[{done + 1}/{len(runs)}, {monotonic() - began:.0f} s] {run_.what}")
            steps += await bench.measure(run_)
        say("")
        return info, _points(steps)
    finally:
        await engine.stop()


def _runs(info: EngineInfo, args: argparse.Namespace) -> Iterator[Run]:
    """Whatever fits the engine, each as often as asked for."""
    room = min(info.max_model_len - 2 * _OUTPUT, (info.kv_blocks_total - 2) * info.block_size // 2)
    chunk = info.max_batched_tokens
    prompts = args.prompts or (32, chunk // 4, chunk // 2, chunk, 3 * chunk, 6 * chunk)
    contexts = args.contexts or (64, 512, 1536)
    for _ in range(args.repeat):
        for tokens in sorted({n for n in prompts if 2 <= n <= room}):
            yield Run(f"a prompt of {tokens} tokens", 0, tokens)
        for context in contexts:
            for tokens in (64, chunk):
                if context + tokens <= room:
                    yield Run(f"{tokens} tokens after {context} cached ones", context, tokens)
        for batch in args.batches:
            for context in contexts:
                # Heads are shared, so that they need be computed once only; what a step reads is the same.
                fits = batch * (context + 2 * _OUTPUT) <= room * 2 and context + 64 <= room
                if batch <= info.max_num_seqs and fits:
                    yield Run(f"{batch} decodes after {context} tokens", context, 8, batch, _OUTPUT)
        for batch in (2, 8):
            if batch < info.max_num_seqs and 512 + 2 * chunk <= room:
                yield Run(f"a prompt beside {batch} decodes", 512, 8, batch, 2 * _OUTPUT, late=2 * chunk)


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


class Bench:
    def __init__(self, engine: Engine, rng: random.Random) -> None:
        self._engine = engine
        self._rng = rng
        self._heads: dict[int, list[int]] = {}
        self._count = 0

    async def measure(self, run_: Run) -> list[StepTiming]:
        """Timings of the steps of one run, the computing of a shared head left out."""
        head = self._heads.get(run_.shared)
        if head is None:
            head = self._heads[run_.shared] = self._text(run_.shared)
        if run_.shared:
            await self._ended([self._submit([*head, *self._text(2)], 1)])
        await asyncio.sleep(0.05)
        self._engine.take_step_timings()
        waiting = [self._submit([*head, *self._text(run_.own)], run_.output) for _ in range(run_.count)]
        if run_.late:
            await asyncio.wait_for(waiting[0].started.wait(), _ONE_S)
            waiting.append(self._submit(self._text(run_.late), 1))
        await self._ended(waiting)
        await asyncio.sleep(0.05)
        return [step for step in self._engine.take_step_timings() if step.duration_s > 0]

    def _text(self, tokens: int) -> list[int]:
        return self._rng.choices(_TOKENS, k=tokens)

    def _submit(self, prompt: list[int], output: int) -> _Waiting:
        self._count += 1
        waiting = _Waiting()
        sampling = SamplingParams(max_tokens=output, temperature=0.0, ignore_eos=True)
        self._engine.submit(EngineRequest(f"profile-{self._count}", prompt, sampling), waiting.sink)
        return waiting

    async def _ended(self, waiting: Sequence[_Waiting]) -> None:
        try:
            async with asyncio.timeout(_ONE_S):
                for one in waiting:
                    await one.ended.wait()
        except TimeoutError:
            raise EngineFailed(f"the engine has not answered for {_ONE_S:.0f} s") from None
        for one in waiting:
            if one.error is not None:
                raise one.error


class _Waiting:
    def __init__(self) -> None:
        self.started = asyncio.Event()
        self.ended = asyncio.Event()
        self.error: Exception | None = None

    def sink(self, output: EngineOutput) -> None:
        self.started.set()
        if output.finish is not None:
            self.error = output.error
            self.ended.set()


def _points(steps: Sequence[StepTiming]) -> list[Point]:
    """Steps of one shape are one point. What a decode reads grows by its batch each step: told apart by 128 tokens per
    sequence."""
    points: dict[tuple[int, int, int, int], Point] = {}
    for step in steps:
        coarse = 128 * max(1, step.decode_sequences)
        kv = -(-step.kv_tokens // coarse) * coarse
        key = (step.prefill_tokens, step.prefill_context_tokens, step.decode_sequences, kv)
        points.setdefault(key, Point(*key)).steps.append(step)
    return [points[key] for key in sorted(points)]


# -- what came of it ---------------------------------------------------------------------------------------------------


def _finish(name: str, model: Model, info: EngineInfo, points: Sequence[Point], output: Path) -> int:
    steps = [step for point in points for step in point.steps]
    source = (
        f"`tandem profile` on {info.engine} {info.engine_version}, {model.name} {info.dtype}, steps of at most "
        f"{info.max_batched_tokens} tokens: {len(steps)} steps of {len(points)} shapes"
    )
    try:
        fitted = fit(name, steps, source)
    except ValueError as error:
        raise ConfigError(f"{error}: give --prompts, --batches and --contexts that fit the engine") from None
    rows, errors = [], []
    for point in points:
        measured = median(step.duration_s for step in point.steps)
        predicted = median(
            step_s(fitted, s.prefill_tokens, s.prefill_context_tokens, s.decode_sequences, s.kv_tokens)
            for s in point.steps
        )
        errors.append(abs(predicted / measured - 1.0))
        row = (str(point), len(point.steps), f"{1e3 * measured:.1f}", f"{1e3 * predicted:.1f}")
        rows.append((*row, f"{predicted / measured - 1.0:+.1%}"))
    fitted = replace(fitted, relative_error=round(sum(errors) / len(errors), 4))
    print("\n".join(table(("step", "times", "measured ms", "profile ms", "residual"), rows)))
    print(
        f"\n{fitted.source}\nmean residual {fitted.relative_error:.1%}, median {median(errors):.1%}, "
        f"worst {max(errors):.1%}\n"
        f"  a step with prompt tokens: {1e3 * fitted.p0:.2f} ms + {1e6 * fitted.p1:.1f} us a token + "
        f"{1e9 * fitted.p2:.2f} ns a token of context + {1e9 * fitted.p3:.2f} ns a KV token read beside it\n"
        f"  a step of decodes: {1e3 * fitted.d0:.2f} ms + {1e6 * fitted.d1:.1f} us a sequence + "
        f"{1e9 * fitted.d2:.2f} ns a KV token"
    )
    kind = profile_file.Kind(
        engine=info.engine,
        engine_version=info.engine_version,
        model=model.name,
        dtype=info.dtype,
        block_size=info.block_size,
        kv_blocks=info.kv_blocks_total,
        kv_bytes_per_token=info.kv_bytes_per_token,
        max_batched_tokens=info.max_batched_tokens,
        max_num_seqs=info.max_num_seqs,
        max_model_len=info.max_model_len,
        link_bytes_per_s=info.link_bytes_per_s,
    )
    try:
        output.write_text(profile_file.dump(profile_file.ProfileFile(fitted, kind)), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {output}: {error.strerror or error}", param="output") from None
    print(f"written to {output}: name it as `profile:` of a pool, or simulate it: tandem sim --hardware {output}")
    return 0

"""The whole local backend on tiny models: text in, text out, and nothing left behind."""

from __future__ import annotations

import gc
import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from errors import DeadlineExceeded, InvalidRequest, ModelUnavailable, UnknownModel
from model.engine.scheduler import Work
from model.local import LocalBackend
from model.text.template import is_harmless
from model.types import Chunk, Done, FinishReason, GenerateRequest, Message, Sampling, Status, Stream
from model.weights.catalogue import find
from model.weights.loader import prepare_tokenizer
from settings import Settings
from telemetry import Metrics
from tests.model.driving import eventually
from tests.model.tiny import ARCHITECTURES, tiny_checkpoint, tiny_model, tiny_tokenizer

WAIT = 100.0  # seconds until a test gives up; the CPU kernels are built in the first of them
GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


def settings_for(checkpoint: Path, data: Path, **changes: object) -> Settings:
    """Settings over a DATA_DIR of its own that shares the CPU kernels, which take half a minute to build."""
    name, kernels = str(checkpoint), Path(__file__).parents[2] / "data/compiled"
    kernels.mkdir(parents=True, exist_ok=True)
    data.mkdir(exist_ok=True)
    if not (data / "compiled").exists():
        (data / "compiled").symlink_to(kernels)
    return Settings(**({"model": name, "models_allowed": (name,), "data_dir": data, "quantization": "none",
                        "compile": False, "threads": 1, "slots": 4, "max_context": 512} | changes))  # type: ignore[arg-type]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def templates_are_tried_once() -> Iterator[None]:
    """In a child process, which takes 1.4 s for every backend."""
    verdicts: dict[str, bool] = {}

    def remembered(source: str, constants: Mapping[str, str]) -> bool:
        return verdicts.get(source) or verdicts.setdefault(source, is_harmless(source, constants))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("model.text.prompt.is_harmless", remembered)
        yield


@pytest.fixture(scope="module")
def backend(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalBackend]:
    backend = LocalBackend(settings_for(checkpoint, tmp_path_factory.mktemp("data")), Metrics())
    yield backend
    backend.close(0)


def ask(backend: LocalBackend, text: str, count: int = 12, **changes: object) -> Stream:
    fields = {"id": "r", "owner": "ann", "model": backend._spec.name, "messages": (Message("user", text),),
              "max_new_tokens": count, "sampling": GREEDY}  # fmt: skip
    return backend.submit(backend.prepare(GenerateRequest(**(fields | changes))))  # type: ignore[arg-type]


def read(stream: Stream) -> tuple[str, Done]:
    text = ""
    while True:
        event = stream.get(WAIT)
        assert event is not None, "the backend went silent"
        if isinstance(event, Done):
            return text, event
        if isinstance(event, Chunk):
            text += event.text


def test_the_text_is_what_transformers_generates(backend: LocalBackend) -> None:
    tokenizer, model = tiny_tokenizer(), tiny_model()
    messages = [{"role": "user", "content": "why is the sky blue?"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    mask = ids.new_ones(ids.shape)
    out = model.generate(ids, attention_mask=mask, max_new_tokens=40, do_sample=False, pad_token_id=0)
    want = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    text, done = read(ask(backend, "why is the sky blue?", 40))
    assert text == want and text
    assert done.usage.prompt_tokens == ids.shape[1]


def test_reasoning_and_answer_are_told_apart_and_counted(tmp_path: Path) -> None:
    """R1's templates start inside <think>: without the closing tag all is reasoning."""
    backend = LocalBackend(settings_for(tiny_checkpoint(tmp_path / "r1", style="r1"), tmp_path / "data"), Metrics())
    stream = ask(backend, "hello", 10)
    events = []
    while not events or not isinstance(events[-1], Done):
        events.append(stream.get(WAIT))
    backend.close(0)
    assert {event.channel for event in events if isinstance(event, Chunk)} == {"reasoning"}
    assert events[-1].usage.reasoning_tokens == events[-1].usage.completion_tokens > 0


def test_a_stop_string_ends_the_text_and_frees_the_slot(backend: LocalBackend) -> None:
    whole, _ = read(ask(backend, "tell me more", 40))
    stop = whole[6:9]
    text, done = read(ask(backend, "tell me more", 40, stop=(stop,)))
    assert (text, done.finish_reason) == (whole[: whole.index(stop)], FinishReason.STOP)
    eventually(lambda: backend.status().details["running"] == 0)


def test_what_cannot_fit_is_refused_before_it_is_queued(backend: LocalBackend) -> None:
    with pytest.raises(InvalidRequest) as refused:
        ask(backend, "word " * 600)
    assert (refused.value.code, refused.value.param) == ("context_length_exceeded", "prompt")
    assert "maximum context length is 512 tokens" in refused.value.message
    with pytest.raises(InvalidRequest) as refused:
        ask(backend, "hi", 512)
    assert (refused.value.code, refused.value.param) == ("context_length_exceeded", "max_new_tokens")
    assert "maximum context length is 512 tokens" in refused.value.message
    with pytest.raises(UnknownModel):
        ask(backend, "hi", model="../../etc/passwd")


def test_weights_are_not_loaded_to_tokenise(checkpoint: Path, tmp_path: Path) -> None:
    settings = settings_for(checkpoint, tmp_path)
    prepare_tokenizer(find(settings), settings)  # as every start but the very first finds it
    backend = LocalBackend(settings, Metrics())
    request = GenerateRequest("r", "ann", backend._spec.name, (Message("user", "hi"),))
    assert backend.prepare(request).prompt_ids
    assert backend.status().stage == "cold" and backend.fingerprint()
    backend.close(0)


def test_no_text_that_fits_the_context_has_more_characters_than_the_bound(backend: LocalBackend) -> None:
    for text in ("blue " * 60, "why is the sky blue", "天空为什么是蓝色的", " " * 50 + "x"):
        prompt = backend.prepare(
            GenerateRequest("r", "ann", backend._spec.name, (Message("user", text),), max_new_tokens=1)
        )
        assert len(text) <= len(prompt.prompt_ids) * backend.max_characters() // 512
    assert backend.max_characters() == 512 * 5  # "Ġblue" and the like are its longest tokens


def test_settings_alone_bound_a_text_whose_models_context_is_not_read_yet(checkpoint: Path, tmp_path: Path) -> None:
    backend = LocalBackend(settings_for(checkpoint, tmp_path, max_context=32_768), Metrics())
    assert backend.max_characters() == 32_768 * 32


@pytest.mark.promise(
    "P30",
    injected="ten long prompts of one user",
    counted="before another's first token, on a real model",
)
def test_a_short_prompt_is_not_delayed_by_another_users_long_ones(
    checkpoint: Path, tmp_path: Path, counted: Callable[..., None]
) -> None:
    backend = LocalBackend(settings_for(checkpoint, tmp_path, slots=16, max_context=1024), Metrics())
    read(ask(backend, "warm", 1))
    runner = backend._engine._scheduler.runner  # type: ignore[union-attr]
    begin, prefill = runner.begin, runner.prefill
    admitted: list[tuple[int, list[int]]] = []  # chunks before it, its prompt
    chunks: list[list[list[int]]] = []

    def logged_begin(row: int, sampling: Sampling, seed: int, tokens: Sequence[int]) -> None:
        admitted.append((len(chunks), list(tokens)))
        begin(row, sampling, seed, tokens)

    def logged_prefill(work: Sequence[Work]) -> list[bool]:
        chunks.append([list(one.tokens) for one in work])
        return prefill(work)

    runner.begin, runner.prefill = logged_begin, logged_prefill  # type: ignore[method-assign]
    long = [ask(backend, f"{n} {'why is the sky so blue ' * 60}", 20, owner="ann") for n in range(10)]
    eventually(lambda: bool(chunks))
    short = ask(backend, "why is the sky blue?", 4, owner="bob")
    prompt = list(short._sequence.request.prompt_ids)  # type: ignore[attr-defined]
    assert read(short)[1].usage.completion_tokens == 4
    for stream in long:
        stream.close()
    backend.close(0)
    since = next(before for before, ids in admitted if ids == prompt)
    until = next(n for n, parts in enumerate(chunks) if any(ids == prompt[-1 - len(ids) : -1] for ids in parts))
    tokens = sum(len(ids) for parts in chunks[since : until + 1] for ids in parts)
    counted(tokens_computed=tokens, tokens_of_its_own=len(prompt))
    assert tokens <= 3 * len(prompt)


def test_a_model_without_a_chat_template_is_not_ready_and_says_why(tmp_path: Path) -> None:
    bare = tiny_checkpoint(tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    backend = LocalBackend(settings_for(bare, tmp_path / "data"), Metrics())
    told: list[str] = []
    backend.preload(told.append)
    eventually(lambda: backend.status().stage == "failed")
    assert not backend.status().ready and backend.status().reason == told[0]
    assert told[0] == "bare has no chat template: use an instruct or chat model"
    with pytest.raises(ModelUnavailable, match="no chat template"):
        ask(backend, "hello")
    backend.close(0)


def test_a_request_that_finds_no_chat_template_makes_the_status_say_so(tmp_path: Path) -> None:
    bare = tiny_checkpoint(tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    settings = settings_for(bare, tmp_path / "data")
    prepare_tokenizer(find(settings), settings)
    backend = LocalBackend(settings, Metrics())
    with pytest.raises(ModelUnavailable, match="no chat template"):
        ask(backend, "hello")
    eventually(lambda: backend.status().stage == "failed")
    assert "no chat template" in (backend.status().reason or "")
    backend.close(0)


def test_fifty_first_requests_load_once(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from model.runtime import build

    loads: list[str] = []

    def counted(*arguments: object, load: Callable[..., object] = build.load_model) -> object:
        loads.append(threading.current_thread().name)
        return load(*arguments)

    monkeypatch.setattr(build, "load_model", counted)
    backend = LocalBackend(settings_for(checkpoint, tmp_path), Metrics())
    with ThreadPoolExecutor(50) as pool:
        texts = set(pool.map(lambda _: read(ask(backend, "all at once"))[0], range(50)))
    backend.close(0)
    assert loads == ["model"] and len(texts) == 1


def test_a_model_that_cannot_be_fetched_is_told_to_requests_that_wait_for_its_tokenizer(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken = tiny_checkpoint(tmp_path / "tiny")
    (broken / "tokenizer.json").unlink()
    backend = LocalBackend(settings_for(broken, tmp_path / "data"), Metrics())
    for _ in range(2):
        with pytest.raises(ModelUnavailable) as refused:
            ask(backend, "hello")
        assert refused.value.retry_after and str(tmp_path) not in refused.value.message
    assert backend.status().stage == "failed" and "tokenizer.json is missing" in caplog.text
    backend.close(0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_listed_architecture_serves(architecture: str, tmp_path: Path) -> None:
    backend = LocalBackend(settings_for(tiny_checkpoint(tmp_path / "m", architecture), tmp_path / "d"), Metrics())
    text, done = read(ask(backend, "hello", 8))
    backend.close(0)
    assert text and done.usage.completion_tokens == 8


def test_two_hundred_mixed_requests_leave_nothing_behind(backend: LocalBackend) -> None:
    """32 threads join, stop, cancel and overrun deadlines; what was complete is what it is alone."""
    alone = {n: read(ask(backend, f"story {n}", 20 + n))[0] for n in range(5)}
    read(ask(backend, "warm"))
    gc.collect()
    files, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    chance = random.Random(11)
    plans = [(chance.choice(["whole", "whole", "stop", "cancel", "leave queued", "deadline"]), chance.randrange(5))
             for _ in range(200)]  # fmt: skip

    def one(plan: tuple[str, int]) -> str:
        kind, n = plan
        owner = f"user{n}"
        if kind == "deadline":
            with pytest.raises(DeadlineExceeded):
                read(ask(backend, f"story {n}", 400, owner=owner, timeout=0.001))
        elif kind == "leave queued":
            ask(backend, f"story {n}", 400, owner=owner).close()
        elif kind == "cancel":
            stream = ask(backend, f"story {n}", 400, owner=owner)
            while not isinstance(event := stream.get(WAIT), Chunk):
                assert event is None or isinstance(event, Status)
            stream.close()
            assert read(stream)[1].finish_reason is FinishReason.CANCELLED
        elif kind == "stop":
            stop = alone[n][4:7]
            text, done = read(ask(backend, f"story {n}", 20 + n, owner=owner, stop=(stop,)))
            assert (text, done.finish_reason) == (alone[n][: alone[n].index(stop)], FinishReason.STOP)
        else:
            assert read(ask(backend, f"story {n}", 20 + n, owner=owner))[0] == alone[n]
        return kind

    with ThreadPoolExecutor(32) as pool:
        kinds = list(pool.map(one, plans))
    assert len(set(kinds)) == 5
    eventually(lambda: (backend.status().details["running"], backend.status().details["waiting"]) == (0, 0))
    gc.collect()
    eventually(lambda: threading.active_count() <= threads)
    assert len(os.listdir("/proc/self/fd")) <= files
    assert read(ask(backend, "story 3", 23))[0] == alone[3]
    details = backend.status().details
    assert details["kv_blocks_free"] == details["kv_blocks"]


@pytest.mark.usefixtures("kernels")
@pytest.mark.promise(
    "P29",
    injected="100 greedy and seeded requests in random order on KV for a quarter of them: beside 1 to 15 others, with "
    "reused prefixes, guesses and preemptions",
    counted="bitwise the text it has alone, computed once without any of these",
)
def test_a_text_is_the_same_whatever_traffic_there_is(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counted: Callable[..., None]
) -> None:
    chance, chat = random.Random(29), "please repeat after me: one two three one two three " * 2
    asked = [(chat * (n % 3) + f"story {n}", 40 + 110 * (n % 4), Sampling(0) if n % 2 else Sampling(0.7, seed=n))
             for n in range(20)]  # fmt: skip
    alone = LocalBackend(settings_for(checkpoint, tmp_path, quantization="nf4", speculate=False, max_context=1024), Metrics())
    want = [read(ask(alone, text, count, owner=f"{n}", sampling=how))[0] for n, (text, count, how) in enumerate(asked)]
    alone.close(0)
    monkeypatch.setattr(
        "model.runtime.gpu.for_kv", lambda free, device: 6 * 256 * 256
    )  # 5 blocks; a token takes 256 bytes
    busy, metrics = settings_for(checkpoint, tmp_path, quantization="nf4", slots=16, max_context=1024), Metrics()
    backend = LocalBackend(busy, metrics)

    def one(n: int) -> bool:
        text, count, how = asked[n]
        return read(ask(backend, text, count, owner=chance.choice("abc"), sampling=how))[0] == want[n]

    with ThreadPoolExecutor(15) as pool:
        same = list(pool.map(one, [chance.randrange(20) for _ in range(100)]))
    told = backend.status().details
    backend.close(0)
    reused = metrics.registry.get_sample_value("llm_cached_prompt_tokens_total")
    preempted = metrics.registry.get_sample_value("llm_preemptions_total")
    counted(
        texts=len(same),
        bitwise_the_same=sum(same),
        prompt_tokens_reused=int(reused or 0),
        preemptions=int(preempted or 0),
    )
    assert all(same) and told["deterministic"] and told["kv_blocks"] == 5 and reused and preempted


def test_only_the_model_thread_ever_imports_torch(checkpoint: Path, tmp_path: Path) -> None:
    """In a fresh process: tokenising loads none of it, and the first submission does."""
    settings = settings_for(checkpoint, tmp_path)
    prepare_tokenizer(find(settings), settings)
    program = f"""
import sys, threading
from pathlib import Path
from model.engine.scheduler import Work
from model.local import LocalBackend
from model.types import GenerateRequest, Message
from settings import Settings
from telemetry import Metrics
backend = LocalBackend(Settings(model={settings.model!r}, models_allowed=({settings.model!r},),
    data_dir=Path({str(tmp_path)!r}), quantization="none", compile=False, max_context=256), Metrics())
request = backend.prepare(GenerateRequest("r", "ann", backend._spec.name, (Message("user", "hi"),), max_new_tokens=2))
assert "torch" not in sys.modules
stream = backend.submit(request)
while stream.get(30).__class__.__name__ != "Done": pass
assert "torch" in sys.modules
backend.close(0)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr

"""A prefix in a cache is to the reader what its own tokens at those positions would be."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from transformers import (
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    StaticCache,
)
from transformers.cache_utils import Cache, DynamicLayer

from latentwire_fast.errors import ConfigError
from latentwire_fast.readers import kv_cache, kv_placement
from latentwire_fast.readers.arriving_layer import settle
from latentwire_fast.readers.kv_cache import CacheFiller, layer_devices
from latentwire_fast.readers.kv_placement import Copies, DeviceRuns

SHAPE = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
PREFIX, REST, LENGTH = 5, 4, 16


@pytest.fixture(params=["llama", "qwen2"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    if request.param == "llama":
        return LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
    return Qwen2ForCausalLM(Qwen2Config(**SHAPE)).eval()


@pytest.fixture(params=["extension", "torch"], autouse=True)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "torch":
        monkeypatch.setattr(kv_placement, "_C", None)
    elif not kv_placement.has_extension():
        pytest.skip("the extension is not built")


@torch.no_grad()
def prefix_of(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """The keys and values that the reader computes for some tokens, as one tensor `[L, 2, ...]`."""
    layers = model(input_ids=ids).past_key_values.layers
    return torch.stack([torch.stack([layer.keys, layer.values]) for layer in layers])


def tokens(rows: int = 2) -> torch.Tensor:
    return torch.randint(50, (rows, PREFIX + REST))


def run_rest(model: PreTrainedModel, ids: torch.Tensor, cache: Cache) -> torch.Tensor:
    """Logits of the tokens after the prefix."""
    positions = torch.arange(PREFIX, PREFIX + REST).expand(len(ids), -1)
    return model(input_ids=ids[:, PREFIX:], past_key_values=cache, position_ids=positions).logits


def new_cache(model: PreTrainedModel, kind: str) -> Cache:
    if kind == "static":
        return StaticCache(config=model.config, max_cache_len=LENGTH)
    return DynamicCache(config=model.config) if kind == "dynamic" else DynamicCache()


@pytest.mark.parametrize("kind", ["dynamic", "lazy", "static"])
@torch.no_grad()
def test_the_reader_goes_on_as_after_its_own_tokens(model: PreTrainedModel, kind: str) -> None:
    ids = tokens()
    cache = new_cache(model, kind)
    copies = CacheFiller.for_model(model).fill(
        cache, prefix_L2BHPD=prefix_of(model, ids[:, :PREFIX]), batch_size=2
    )
    assert copies == Copies(prepare=0, link=0, scatter=int(kind == "static"))
    assert int(cache.get_seq_length()) == PREFIX
    expected = model(input_ids=ids).logits[:, PREFIX:]
    torch.testing.assert_close(run_rest(model, ids, cache), expected, rtol=1e-5, atol=1e-6)
    assert int(cache.get_seq_length()) == PREFIX + REST


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@torch.no_grad()
def test_a_prefix_of_one_is_broadcast(model: PreTrainedModel, kind: str) -> None:
    ids = tokens(1).repeat(3, 1)
    ids[:, PREFIX:] = torch.randint(50, (3, REST))
    cache = new_cache(model, kind)
    prefix = prefix_of(model, ids[:1, :PREFIX])
    CacheFiller.for_model(model).fill(cache, prefix_L2BHPD=prefix, batch_size=3)
    expected = model(input_ids=ids).logits[:, PREFIX:]
    torch.testing.assert_close(run_rest(model, ids, cache), expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_a_static_cache_takes_one_prefix_after_another_in_place(model: PreTrainedModel) -> None:
    filler = CacheFiller.for_model(model)
    cache = new_cache(model, "static")
    addresses = []
    for _ in range(2):
        ids = tokens()
        prefix = prefix_of(model, ids[:, :PREFIX])
        copies = filler.fill(cache, prefix_L2BHPD=prefix, batch_size=2)
        assert copies.scatter == 1
        addresses.append([layer.keys.data_ptr() for layer in cache.layers])
        expected = model(input_ids=ids).logits[:, PREFIX:]
        torch.testing.assert_close(run_rest(model, ids, cache), expected, rtol=1e-5, atol=1e-6)
    assert addresses[0] == addresses[1]


@torch.no_grad()
def test_a_static_cache_that_owns_its_tensors_takes_a_copy_for_each(model: PreTrainedModel) -> None:
    ids = tokens()
    cache = new_cache(model, "static")
    model(input_ids=tokens(), past_key_values=cache)
    prefix = prefix_of(model, ids[:, :PREFIX])
    copies = CacheFiller.for_model(model).fill(cache, prefix_L2BHPD=prefix, batch_size=2)
    assert copies.scatter == 2 * SHAPE["num_hidden_layers"]
    expected = model(input_ids=ids).logits[:, PREFIX:]
    torch.testing.assert_close(run_rest(model, ids, cache), expected, rtol=1e-5, atol=1e-6)


def test_gradients_reach_the_prefix(model: PreTrainedModel) -> None:
    """As they do when every layer is put into the cache by hand."""
    ids = tokens()
    data = prefix_of(model, ids[:, :PREFIX])
    model.requires_grad_(False)
    placed, by_hand = (data.clone().requires_grad_() for _ in range(2))
    filled = new_cache(model, "dynamic")
    CacheFiller.for_model(model).fill(filled, prefix_L2BHPD=placed, batch_size=2)
    updated = new_cache(model, "dynamic")
    for number, (keys, values) in enumerate(by_hand):
        updated.update(keys, values, number)
    for cache in (filled, updated):
        run_rest(model, ids, cache).square().sum().backward()
    assert by_hand.grad is not None
    assert by_hand.grad.abs().min() > 0
    assert torch.equal(placed.grad, by_hand.grad)


@torch.no_grad()
def test_the_prefix_is_cast_to_the_reader(model: PreTrainedModel) -> None:
    model.to(torch.bfloat16)
    prefix = prefix_of(model, tokens()[:, :PREFIX]).float()
    cache = new_cache(model, "dynamic")
    copies = CacheFiller.for_model(model).fill(cache, prefix_L2BHPD=prefix, batch_size=2)
    assert copies == Copies(prepare=1, link=0, scatter=0)
    assert cache.layers[1].values.dtype == torch.bfloat16
    assert torch.equal(cache.layers[1].values, prefix[1, 1].bfloat16())


class TestRefusals:
    @pytest.fixture
    def filler(self, model: PreTrainedModel) -> CacheFiller:
        return CacheFiller.for_model(model)

    @pytest.mark.parametrize(
        ("shape", "message"),
        [
            ((3, 2, 1, 4, PREFIX, 8), "4 key/value heads of width 8 and the reader 2 of width 8"),
            ((3, 2, 1, 2, PREFIX, 16), "made for another reader"),
            ((2, 2, 1, 2, PREFIX, 8), "the prefix has 2 layers and the reader 3"),
            ((3, 2, 1, 2, LENGTH + 1, 8), "the prefix has 17 positions and the cache holds 16"),
        ],
    )
    def test_a_prefix_that_does_not_fit(
        self, filler: CacheFiller, model: PreTrainedModel, shape: tuple[int, ...], message: str
    ) -> None:
        cache = new_cache(model, "static")
        with pytest.raises(ConfigError, match=message):
            filler.fill(cache, prefix_L2BHPD=torch.zeros(shape), batch_size=1)
        assert not cache.layers[0].is_initialized

    def test_a_cache_in_use(self, filler: CacheFiller, model: PreTrainedModel) -> None:
        cache = model(input_ids=tokens(1)).past_key_values
        with pytest.raises(ConfigError, match="already holds positions"):
            filler.fill(cache, prefix_L2BHPD=torch.zeros(3, 2, 1, 2, 5, 8), batch_size=1)

    def test_a_cache_of_another_reader(self, filler: CacheFiller) -> None:
        cache = DynamicCache(config=LlamaConfig(**SHAPE | {"num_hidden_layers": 7}))
        with pytest.raises(ConfigError, match="the cache has 7 layers and the reader 3"):
            filler.fill(cache, prefix_L2BHPD=torch.zeros(3, 2, 1, 2, 5, 8), batch_size=1)

    def test_a_model_with_more_layers_than_the_prefix(self, model: PreTrainedModel) -> None:
        """A map by hand that misses a layer: an error, not a layer without its prefix."""
        filler = CacheFiller(["cpu"] * 2, dtype=torch.float32, heads=2, head_width=8)
        cache = DynamicCache()
        filler.fill(cache, prefix_L2BHPD=torch.zeros(2, 2, 1, 2, 5, 8), batch_size=1)
        with pytest.raises(IndexError):
            model(input_ids=tokens(1)[:, :1], past_key_values=cache)

    def test_a_sliding_window(self, filler: CacheFiller) -> None:
        config = Qwen2Config(
            **SHAPE, use_sliding_window=True, sliding_window=4, max_window_layers=0
        )
        cache = DynamicCache(config=config)
        with pytest.raises(ConfigError, match="SlidingWindowLayer"):
            filler.fill(cache, prefix_L2BHPD=torch.zeros(3, 2, 1, 2, 5, 8), batch_size=1)

    def test_a_static_cache_of_another_batch(
        self, filler: CacheFiller, model: PreTrainedModel
    ) -> None:
        cache = new_cache(model, "static")
        filler.fill(cache, prefix_L2BHPD=torch.zeros(3, 2, 1, 2, 5, 8), batch_size=2)
        with pytest.raises(ConfigError, match="the cache is"):
            filler.fill(cache, prefix_L2BHPD=torch.zeros(3, 2, 1, 2, 5, 8), batch_size=3)

    def test_training_with_a_static_cache(
        self, filler: CacheFiller, model: PreTrainedModel
    ) -> None:
        prefix = torch.zeros(3, 2, 1, 2, 5, 8, requires_grad=True)
        with pytest.raises(ConfigError, match="train with a DynamicCache"):
            filler.fill(new_cache(model, "static"), prefix_L2BHPD=prefix, batch_size=1)


class FakePlacement:
    """A placement that notes what was sent to two accelerators, and which stream waited for it."""

    def __init__(self, log: list[Any], sent: int, stream: list[int]) -> None:
        self.log, self.sent, self.stream = log, sent, stream
        self.copies = Copies(prepare=0, link=2, scatter=0)
        self.keys = self.values = (torch.zeros(1, 2, PREFIX, 8),) * 3
        self.waited: set[tuple[int, int]] = set()

    def is_under_way(self, layer: int) -> bool:
        return layer > 0

    def wait_for_layer(self, layer: int) -> None:
        """As the extension: for each stream the first call counts."""
        if (layer, self.stream[0]) not in self.waited:
            self.waited.add((layer, self.stream[0]))
            self.log.append((f"stream {self.stream[0]}", "waits for", "AB"[self.sent], layer))

    def wait(self, number: int) -> None:
        self.wait_for_layer(number)


@pytest.fixture
def accelerated(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> tuple[CacheFiller, list[Any], list[int]]:
    """A filler of a model whose first layer is on the CPU, the others on two accelerators; a log of
    layers and waits; and the number of the stream that is current."""

    class FakePlacer:
        def __init__(self, devices: list[str], *, dtype: torch.dtype) -> None:
            self.plan = [DeviceRuns(f"accelerator:{n}", [(n, 1)]) for n in range(3)]
            self.plan[0] = DeviceRuns("cpu", [(0, 1)])

        def place(self, prefix: torch.Tensor, *, batch_size: int, stable: bool) -> FakePlacement:
            sent.append(len(sent))
            return FakePlacement(log, sent[-1], stream)

    log: list[Any] = []
    sent: list[int] = []
    stream = [1]
    monkeypatch.setattr(kv_cache, "Placer", FakePlacer)
    for number, layer in enumerate(model.model.layers):
        layer.register_forward_pre_hook(lambda *_, number=number: log.append(f"layer {number}"))
    filler = CacheFiller.for_model(model)
    log.clear()  # of the token that its geometry was measured on
    return filler, log, stream


def filled(model: PreTrainedModel, filler: CacheFiller) -> Cache:
    cache = DynamicCache(config=model.config)
    filler.fill(cache, prefix_L2BHPD=torch.zeros(3, 2, 1, 2, PREFIX, 8), batch_size=1)
    return cache


@torch.no_grad()
def test_each_layer_waits_for_its_part_and_once(
    model: PreTrainedModel, accelerated: tuple[CacheFiller, list[Any], list[int]]
) -> None:
    filler, log, _ = accelerated
    cache = filled(model, filler)
    assert log == [], "nothing waits before something is read"
    model(input_ids=tokens(1)[:, :2], past_key_values=cache)
    one, two = (("stream 1", "waits for", "A", layer) for layer in (1, 2))
    assert log == ["layer 0", "layer 1", one, "layer 2", two]
    log.clear()
    model(input_ids=tokens(1)[:, :2], past_key_values=cache)
    assert log == ["layer 0", "layer 1", "layer 2"], "nothing is waited for twice"


@torch.no_grad()
def test_a_forward_waits_for_its_own_cache_on_its_own_stream(
    model: PreTrainedModel, accelerated: tuple[CacheFiller, list[Any], list[int]]
) -> None:
    """Fill A, fill B and read B on stream 2, then read A on stream 1. When the filler kept one list
    of placements, stream 2 waited for both, and stream 1 read A without any wait."""
    filler, log, stream = accelerated
    a = filled(model, filler)
    stream[0] = 2
    b = filled(model, filler)
    model(input_ids=tokens(1)[:, :2], past_key_values=b)
    stream[0] = 1
    model(input_ids=tokens(1)[:, :2], past_key_values=a)
    assert log == [
        *("layer 0", "layer 1", ("stream 2", "waits for", "B", 1)),
        *("layer 2", ("stream 2", "waits for", "B", 2)),
        *("layer 0", "layer 1", ("stream 1", "waits for", "A", 1)),
        *("layer 2", ("stream 1", "waits for", "A", 2)),
    ]


@torch.no_grad()
def test_whoever_reads_a_cache_waits_for_it(
    model: PreTrainedModel, accelerated: tuple[CacheFiller, list[Any], list[int]]
) -> None:
    filler, log, stream = accelerated
    cache = filled(model, filler)
    assert cache.layers[2].keys is not None
    assert log == [("stream 1", "waits for", "A", 2)]
    stream[0] = 2
    log.clear()
    copied = deepcopy(cache)
    assert sorted(log) == [("stream 2", "waits for", "A", layer) for layer in (1, 2)]
    log.clear()
    assert copied.get_seq_length() == PREFIX
    settle(copied)
    assert log == [], "a copy was made after the wait"
    stream[0] = 3
    settle(cache)
    assert sorted(log) == [("stream 3", "waits for", "A", layer) for layer in (1, 2)]
    assert {type(layer) for layer in cache.layers} == {DynamicLayer}


@torch.no_grad()
def test_a_static_cache_is_there_for_the_stream_that_filled_it(
    model: PreTrainedModel, accelerated: tuple[CacheFiller, list[Any], list[int]]
) -> None:
    filler, log, _ = accelerated
    cache = StaticCache(config=model.config, max_cache_len=PREFIX + REST)
    cache.early_initialization(1, 2, 8, torch.float32, torch.device("cpu"))
    filler.fill(cache, prefix_L2BHPD=torch.zeros(3, 2, 1, 2, PREFIX, 8), batch_size=1)
    assert log == [("stream 1", "waits for", "A", number) for number in range(3)]


def test_readers_without_grouped_heads_or_with_other_names() -> None:
    """GPT-2 calls its layers `h`; it and GPT-NeoX have no entry for key/value heads."""
    sizes = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    models = [
        GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4)),
        GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, intermediate_size=64)),
        OPTForCausalLM(OPTConfig(**sizes, ffn_dim=64, word_embed_proj_dim=32)),
    ]
    for model in models:
        filler = CacheFiller.for_model(model)
        cache = DynamicCache(config=model.config)
        filler.fill(cache, prefix_L2BHPD=torch.zeros(2, 2, 1, 4, 5, 8), batch_size=1)
        assert cache.get_seq_length() == 5


@pytest.mark.gpu
@torch.no_grad()
def test_two_streams_on_a_gpu(model: PreTrainedModel) -> None:
    """Fill A on one stream, fill and read B on another, read A: each comes late, from the host, and
    is overwritten there as soon as it has been placed."""
    ids = tokens().cuda()
    model.cuda()
    positions = torch.arange(PREFIX, PREFIX + REST, device="cuda").expand(2, -1)
    filler = CacheFiller.for_model(model)
    both = [ids, ids.flip(0)]
    expected = [model(input_ids=one).logits[:, PREFIX:] for one in both]
    wholes = [prefix_of(model, one[:, :PREFIX]).cpu() for one in both]
    for _ in range(5):
        streams = [torch.cuda.Stream() for _ in both]
        caches, found = [], {}
        torch.cuda.synchronize()
        for whole, stream in zip(wholes, streams, strict=True):
            with torch.cuda.stream(stream):
                held, cache = whole.clone().pin_memory(), new_cache(model, "dynamic")
                torch.cuda._sleep(5_000_000)
                filler.fill(cache, prefix_L2BHPD=held, batch_size=2)
                held.fill_(float("nan"))
                caches.append(cache)
        for number in (1, 0):
            with torch.cuda.stream(streams[number]):
                found[number] = model(
                    input_ids=both[number][:, PREFIX:],
                    past_key_values=caches[number],
                    position_ids=positions,
                ).logits
        torch.cuda.synchronize()
        for number, logits in found.items():
            torch.testing.assert_close(logits, expected[number], rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@torch.no_grad()
def test_a_delayed_producer_on_a_gpu(model: PreTrainedModel) -> None:
    """The prefix is still being made when it is placed, and the model starts at once."""
    ids = tokens().cuda()
    model.cuda()
    expected = model(input_ids=ids).logits[:, PREFIX:]
    whole = prefix_of(model, ids[:, :PREFIX])
    filler = CacheFiller.for_model(model)
    for source in ("cuda", "cpu"):
        held = whole.cpu().pin_memory()
        cache = new_cache(model, "dynamic")
        late = torch.zeros_like(whole)
        torch.cuda.synchronize()
        torch.cuda._sleep(50_000_000)
        late.copy_(whole)
        filler.fill(cache, prefix_L2BHPD=late if source == "cuda" else held, batch_size=2)
        positions = torch.arange(PREFIX, PREFIX + REST, device="cuda").expand(2, -1)
        found = model(
            input_ids=ids[:, PREFIX:], past_key_values=cache, position_ids=positions
        ).logits
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_layer_devices_follow_where_a_layer_computes(model: PreTrainedModel) -> None:
    """Of a layer that accelerate offloads, the weights are on `meta`; its hook knows the device."""
    from accelerate import cpu_offload

    assert layer_devices(model) == ["cpu"] * 3
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert next(model.model.layers[0].parameters()).is_meta
    assert layer_devices(model) == ["cpu"] * 3


def test_layers_without_memory_are_refused() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    with pytest.raises(ConfigError, match="layer 0 is on 'meta'"):
        CacheFiller.for_model(model)

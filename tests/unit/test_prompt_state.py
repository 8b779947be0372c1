"""A prompt's keys and values are those of the weights as they are, at the text's own positions, for each thread."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import mmpeft
from mmpeft.errors import ConfigError, Refused
from mmpeft.hosting.unchanged import Watched
from tests.matrix.families.transformers import FAMILIES, GQA, LM, TOKENS, WORDS

P = 3


def _tuned(model: nn.Module, method: mmpeft.Method | None = None) -> tuple[nn.Module, nn.Module, mmpeft.Tuning, Tensor]:
    """A tuned model, an untouched copy, the handle and the prompt."""
    plain = copy.deepcopy(model)
    tuning = mmpeft.attach(model, method or mmpeft.PromptTuning(tokens=P))
    return model, plain, tuning, tuning.placements[0].part.embeddings()


def _by_hand(plain: nn.Module, prompt: Tensor, ids: Tensor, mask: Tensor | None = None, **more: Any) -> Tensor:
    """Logits of the untouched model on concatenated embeddings, for the text alone."""
    text = plain.get_input_embeddings()(ids)
    embeds = torch.cat([prompt.to(text).expand(len(ids), -1, -1), text], dim=1)
    whole = None if mask is None else torch.cat([mask.new_ones(len(ids), P), mask], dim=1)
    return plain(inputs_embeds=embeds, attention_mask=whole, **more).logits[:, P:]


def _data_copy(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())))


def _data_set(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))


def _in_place(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.mul_(1.5)


def _loaded(assign: bool) -> Callable[[nn.Module], None]:
    def load(model: nn.Module) -> None:
        other = {n: t * 2 for n, t in model.state_dict().items() if ".mmpeft." not in f".{n}"}
        model.load_state_dict(other, strict=False, assign=assign)

    return load


CHANGES: dict[str, Callable[[nn.Module], Any]] = {
    "copied through .data": _data_copy,
    "another .data": _data_set,
    "in place": _in_place,
    "a state dict": _loaded(False),
    "a state dict assigned": _loaded(True),
    "another type": lambda model: model.double(),
    "one weight": lambda model: model.model.layers[0].self_attn.k_proj.weight.data.add_(0.3),
    "a module": lambda model: setattr(model.model.layers[0].mlp, "act_fn", nn.Tanh()),
}


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_a_kept_prompt_is_that_of_the_weights_as_they_are(change: str) -> None:
    model, plain, _, prompt = _tuned(FAMILIES["llama"]().model)
    ids = torch.randint(3, WORDS, (2, TOKENS))
    before = model(ids).logits
    torch.testing.assert_close(before, _by_hand(plain, prompt, ids), atol=1e-5, rtol=1e-4)
    model.requires_grad_(False)
    tokens = prompt.clone()
    for changed in (model, plain):
        CHANGES[change](changed)
    prompt.data.copy_(tokens)  # that one is the test's own
    after = model(ids).logits
    exact = 1e-10 if change == "another type" else 1e-4  # keys of single precision would be seen
    assert (after - before).abs().max() > exact
    torch.testing.assert_close(after, _by_hand(plain, prompt, ids), atol=exact, rtol=exact)


@torch.no_grad()
def test_a_prompt_loaded_or_written_through_data_answers_at_once() -> None:
    model, plain, tuning, prompt = _tuned(FAMILIES["llama"]().model)
    ids = torch.randint(3, WORDS, (2, TOKENS))
    model(ids)
    tuning.load_state_dict({n: t + 1 for n, t in tuning.state_dict().items()})
    torch.testing.assert_close(model(ids).logits, _by_hand(plain, prompt, ids), atol=1e-5, rtol=1e-4)
    prompt.data.copy_(torch.randn_like(prompt))
    torch.testing.assert_close(model(ids).logits, _by_hand(plain, prompt, ids), atol=1e-5, rtol=1e-4)
    prompt.data = torch.randn_like(prompt)
    torch.testing.assert_close(model(ids).logits, _by_hand(plain, prompt, ids), atol=1e-5, rtol=1e-4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = model(ids).logits
    torch.testing.assert_close(model(ids).logits, _by_hand(plain, prompt, ids), atol=1e-5, rtol=1e-4)
    assert (low.float() - model(ids).logits).abs().max() > 1e-4
    with torch.inference_mode():
        model(ids)
    torch.testing.assert_close(model(ids).logits, _by_hand(plain, prompt, ids), atol=1e-5, rtol=1e-4)


def test_watching_hundreds_of_tensors_takes_no_time() -> None:
    import time

    model = nn.ModuleList(nn.Linear(64, 64) for _ in range(150))
    watched = Watched(model)
    assert watched.note()
    times = []
    for _ in range(20):
        start = time.perf_counter()
        assert watched.same()
        times.append(time.perf_counter() - start)
    assert min(times) < 5e-3  # about .4 ms; the machine may be busy


@pytest.mark.parametrize("recorded", [False, True])
def test_threads_that_run_one_model_at_once(recorded: bool) -> None:
    """Eight at once, without gradients and with them, answer as one after the other."""
    model, _, _, prompt = _tuned(FAMILIES["llama"]().model, mmpeft.PromptTuning(tokens=P) + mmpeft.UniPELT())
    texts = [torch.randint(3, WORDS, (1 + i % 3, TOKENS + i)) for i in range(8)]

    def answer(ids: Tensor) -> Tensor:
        with torch.set_grad_enabled(recorded):
            return model(ids).logits.detach()

    expected = [answer(ids) for ids in texts]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            with torch.no_grad():
                prompt.mul_(1.0)  # a new version: recorded again, by several threads at once
            for a, b in zip(pool.map(answer, texts), expected):
                torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_a_pass_without_gradients_before_blocks_are_computed_again() -> None:
    model, _, tuning, _ = _tuned(FAMILIES["llama"]().model)
    ids = torch.randint(3, WORDS, (2, TOKENS))
    plain = torch.autograd.grad(model(ids).logits.square().mean(), list(tuning.parameters()))
    model.gradient_checkpointing_enable()
    model.train()
    loss = model(ids).logits.square().mean()
    with torch.no_grad():
        model(ids[:1, :4])
    torch.testing.assert_close(torch.autograd.grad(loss, list(tuning.parameters())), plain, atol=1e-4, rtol=1e-4)
    assert all(m.gradient_checkpointing for m in model.modules() if hasattr(m, "gradient_checkpointing"))


# -- positions and masks -------------------------------------------------------------------------------------

LEFT = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * TOKENS])
WINDOW = {**GQA, "sliding_window": 4}
DECODERS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: FAMILIES["llama"]().model,
    "gpt2": lambda: FAMILIES["gpt2"]().model,
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**WINDOW)).eval(),
    "gemma3": lambda: hf.Gemma3ForCausalLM(
        hf.Gemma3TextConfig(**WINDOW, layer_types=["sliding_attention", "full_attention"])
    ).eval(),
    "roberta": lambda: hf.RobertaForCausalLM(hf.RobertaConfig(**LM, is_decoder=True)).eval(),
    "bert": lambda: hf.BertLMHeadModel(hf.BertConfig(**LM, is_decoder=True)).eval(),
}


@pytest.mark.parametrize("positions", [False, True])
@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("family", DECODERS)
@torch.no_grad()
def test_padded_batches_are_those_of_concatenated_embeddings(family: str, padding: str, positions: bool) -> None:
    torch.manual_seed(0)
    model, plain, _, prompt = _tuned(DECODERS[family]())
    ids = torch.randint(3, WORDS, (2, TOKENS))
    mask = {"none": None, "left": LEFT, "right": LEFT.flip(1)}[padding]
    real = torch.ones_like(ids).bool() if mask is None else mask.bool()
    own, theirs = {}, {}
    if positions:
        whole = torch.cat([real.new_ones(2, P), real], dim=1).long()
        first = 1 if family == "roberta" else 0
        own = {"position_ids": ((real.long().cumsum(1) - 1).clamp(min=0)) + first}
        theirs = {"position_ids": (whole.cumsum(1) - 1) + first}
    ours = model(ids, attention_mask=mask, **own).logits
    expected = _by_hand(plain, prompt, ids, mask, **theirs)
    torch.testing.assert_close(ours[real], expected[real], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "mistral"])
@torch.no_grad()
def test_two_prompts_stand_one_before_the_other(family: str) -> None:
    torch.manual_seed(0)
    method = mmpeft.PromptTuning(tokens=P) + mmpeft.PTuning(tokens=2, hidden=0) + mmpeft.PTuningV2(tokens=2)
    model, plain, tuning, near = _tuned(DECODERS[family](), method)
    ids, mask = torch.randint(3, WORDS, (2, TOKENS)), LEFT
    for placement in tuning.placements:
        if placement.key == "ptuningv2":
            placement.part.tokens.fill_(0.5)
    far = next(p.part for p in tuning.placements if p.key == "ptuning").embeddings()
    one = mmpeft.attach(copy.deepcopy(plain), mmpeft.PromptTuning(tokens=P + 2) + mmpeft.PTuningV2(tokens=2))
    one.placements[0].part.tokens.copy_(torch.cat([far, near]))
    for placement in one.placements:
        if placement.key == "ptuningv2":
            placement.part.tokens.fill_(0.5)
    expected = one.model(ids, attention_mask=mask).logits
    torch.testing.assert_close(model(ids, attention_mask=mask).logits[mask.bool()], expected[mask.bool()])


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "gemma3", "bert"])
def test_generation_on_an_untouched_copy(family: str, padding: str) -> None:
    torch.manual_seed(0)
    model, plain, _, prompt = _tuned(DECODERS[family]())
    ids, mask = torch.randint(3, WORDS, (2, TOKENS)), LEFT if padding == "left" else torch.ones_like(LEFT)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": WORDS + 1}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    ours = model.generate(ids, attention_mask=mask, **options)
    text = plain.get_input_embeddings()(ids)
    embeds = torch.cat([prompt.detach().to(text).expand(2, -1, -1), text], dim=1)
    theirs = plain.generate(inputs_embeds=embeds, attention_mask=torch.cat([mask.new_ones(2, P), mask], 1), **options)
    assert torch.equal(ours.sequences[:, TOKENS:], theirs.sequences)
    for a, b in zip(ours.logits, theirs.logits):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_a_text_too_long_for_learned_positions_is_refused() -> None:
    model = hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=WORDS, n_positions=8))
    mmpeft.attach(model, mmpeft.PromptTuning(tokens=P))
    assert model(torch.ones(1, 5, dtype=torch.long)).logits.shape[1] == 5
    with pytest.raises(ConfigError, match="shorten the text to 5"):
        model(torch.ones(1, 6, dtype=torch.long))


def test_decoders_that_ask_no_registry_are_refused() -> None:
    model = hf.RemBertForCausalLM(hf.RemBertConfig(**LM, is_decoder=True))
    with pytest.raises(Refused, match="no way to lengthen"):
        mmpeft.attach(model, mmpeft.PromptTuning(tokens=P))


# -- positions of pictures -----------------------------------------------------------------------------------

VISION = {"depth": 1, "num_heads": 2, "patch_size": 4, "temporal_patch_size": 2, "spatial_merge_size": 2}
WORD = {**GQA, "vocab_size": 80, "max_position_embeddings": 64}
IDS = {"image_token_id": 70, "video_token_id": 71, "vision_start_token_id": 72, "vision_end_token_id": 73}
ROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 100.0}}


def _qwen(name: str) -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "out_hidden_size": 32}
    if name == "Qwen2VL":
        sizes = {"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2}
    if name == "Qwen2_5_VL":
        sizes |= {"window_size": 16, "fullatt_block_indexes": [0]}
    if name == "Qwen3VL":
        sizes |= {"num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
    config = getattr(hf, f"{name}Config")(text_config={**WORD, **ROPE}, vision_config={**VISION, **sizes}, **IDS)
    torch.manual_seed(0)
    model = getattr(hf, f"{name}ForConditionalGeneration")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2 if parameter.dim() > 1 else 1)
    return model


def _pictures(kind: str) -> dict[str, Tensor]:
    """A text around one picture of 4x6 patches in each row, or a text alone."""
    picture = [72, *[70] * 6, 73] if "picture" in kind else []
    rows = [[5, 6, *picture, 7, 8, 9], [0, 0, *picture, 10, 11, 12]]
    ids = torch.tensor(rows)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": (ids == 70).long()}
    if "left" in kind:
        batch["attention_mask"][1, :2] = 0
    if picture:
        grid = torch.tensor([[1, 4, 6]] * 2)
        batch |= {"pixel_values": torch.randn(2 * 24, 3 * 2 * 4 * 4), "image_grid_thw": grid}
    return batch


def _told(plain: nn.Module, batch: dict[str, Tensor]) -> dict[str, Any]:
    """What the untouched model tells its text model."""
    seen: list[dict[str, Any]] = []
    inner = plain.model.language_model
    handle = inner.register_forward_pre_hook(lambda m, a, k: seen.append(k), with_kwargs=True)
    plain(**batch)
    handle.remove()
    return seen[0]


def _pictured_by_hand(plain: nn.Module, prompt: Tensor, batch: dict[str, Tensor], counted: bool = False) -> Tensor:
    """Without pictures the model numbers words as they stand, `generate` those that the mask leaves in."""
    told = _told(plain, batch)
    embeds, positions = told["inputs_embeds"], told["position_ids"]
    rows = len(embeds)
    if positions is None:
        mask = batch["attention_mask"] if counted else torch.ones_like(batch["attention_mask"])
        positions = (mask.cumsum(1) - 1).clamp(min=0)
    front = torch.arange(P).expand(*positions.shape[:-1], -1)
    longer = {
        "inputs_embeds": torch.cat([prompt.expand(rows, -1, -1), embeds], dim=1),
        "attention_mask": torch.cat([torch.ones(rows, P, dtype=torch.long), batch["attention_mask"]], dim=1),
        "position_ids": torch.cat([front, positions + P], dim=-1),
        "use_cache": False,
    }
    if told.get("visual_pos_masks") is not None:
        longer["visual_pos_masks"] = torch.cat([torch.zeros(rows, P, dtype=torch.bool), told["visual_pos_masks"]], 1)
        longer["deepstack_visual_embeds"] = told["deepstack_visual_embeds"]
    return plain.lm_head(plain.model.language_model(**longer).last_hidden_state[:, P:])


@pytest.mark.parametrize("kind", ["text", "text left", "picture", "picture left"])
@pytest.mark.parametrize("name", ["Qwen2VL", "Qwen2_5_VL", "Qwen3VL"])
@torch.no_grad()
def test_pictures_keep_their_places(name: str, kind: str) -> None:
    model, plain, _, prompt = _tuned(_qwen(name))
    batch = _pictures(kind)
    real = batch["attention_mask"].bool()
    expected = _pictured_by_hand(plain, prompt, batch)
    torch.testing.assert_close(model(**batch).logits[real], expected[real], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["text left", "picture left"])
@pytest.mark.parametrize("name", ["Qwen2VL", "Qwen2_5_VL", "Qwen3VL"])
@torch.no_grad()
def test_generation_after_pictures(name: str, kind: str) -> None:
    """Word after word, each time on the whole text."""
    model, plain, _, prompt = _tuned(_qwen(name))
    batch = _pictures(kind)
    found = model.generate(**batch, max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=79)
    whole = dict(batch)
    for _ in range(4):
        word = _pictured_by_hand(plain, prompt, whole, counted=True)[:, -1].argmax(-1, keepdim=True)
        whole["input_ids"] = torch.cat([whole["input_ids"], word], dim=1)
        whole["attention_mask"] = torch.cat([whole["attention_mask"], torch.ones_like(word)], dim=1)
        whole["mm_token_type_ids"] = torch.cat([whole["mm_token_type_ids"], torch.zeros_like(word)], dim=1)
    assert torch.equal(found, whole["input_ids"])


@pytest.mark.parametrize("recorded", [False, True])
def test_compiled_as_one_graph(recorded: bool) -> None:
    model, _, _, _ = _tuned(FAMILIES["llama"]().model)
    ids = torch.randint(3, WORDS, (2, TOKENS))
    torch._dynamo.reset()
    with torch.set_grad_enabled(recorded):
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)

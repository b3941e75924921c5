"""Tiny random-weight models and tokenizers, made in a second, for tests that need a real transformers model.

Knows nothing about the engine; the weights are float32 so that equal computations give equal bits.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

ARCHITECTURES: dict[str, tuple[str, dict[str, object]]] = {  # transformers' name, and what others do not have
    "LlamaForCausalLM": ("llama", {}),
    "MistralForCausalLM": ("mistral", {"sliding_window": 1024}),  # the context, which is all that may be served
    "Phi3ForCausalLM": ("phi3", {}),
    "Qwen2ForCausalLM": ("qwen2", {}),
    "Qwen3ForCausalLM": ("qwen3", {}),
    "Gemma3ForCausalLM": ("gemma3_text", {
        "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 1024, "query_pre_attn_scalar": 40,
    }),
    "Qwen3MoeForCausalLM": ("qwen3_moe", {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}),
}  # fmt: skip
VOCABULARY = 300

CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are tiny.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The structure of R1's template: BOS, answers without their reasoning, and a start inside <think>.
R1 = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ m['content'] }}{% endif %}"
    "{% if m['role'] == 'user' %}<|User|>{{ m['content'] }}{% endif %}"
    "{% if m['role'] == 'assistant' %}{% set content = m['content'] %}"
    "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
    "<|Assistant|>{{ content }}<|end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
)
_STYLES = {  # name -> (template, special tokens, tokens that are added but not special, bos, eos)
    "chatml": (CHATML, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], ["<think>", "</think>"], None, "<|im_end|>"),
    "r1": (R1, ["<|begin|>", "<|end|>"], ["<|User|>", "<|Assistant|>", "<think>", "</think>"], "<|begin|>", "<|end|>"),
}


@cache
def _bpe() -> str:
    """A byte-level BPE over every byte and a few merges, as JSON: small, and able to spell any text."""
    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 8, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    bare.train_from_iterator(["the sky is blue and the sea is the same blue, 天空是蓝色的, why is it so?"] * 4, trainer)
    return bare.to_str()


def tiny_tokenizer(style: str = "chatml") -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with the special tokens and chat template of `style` (chatml or r1)."""
    template, special, added, bos, eos = _STYLES[style]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_bpe()), bos_token=bos, eos_token=eos, clean_up_tokenization_spaces=False
    )
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.add_tokens(added)
    tokenizer.chat_template = template
    return tokenizer


def tiny_model(architecture: str = "LlamaForCausalLM", **overrides: object) -> PreTrainedModel:
    """A random float32 model in eval mode: 2 layers, hidden 64, 4 heads over 2 KV heads of 16, always the same."""
    shape = {
        "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 1024,
        "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": tiny_tokenizer().eos_token_id,
        "pad_token_id": None,
        "initializer_range": 0.1,  # wide enough that greedy choices are clear, so that tests compare texts
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(7)
        name, own = ARCHITECTURES[architecture]
        config = AutoConfig.for_model(name, **(shape | own | overrides))
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def tiny_checkpoint(folder: Path, architecture: str = "LlamaForCausalLM", style: str = "chatml") -> Path:
    """A local model directory (config, safetensors, tokenizer with its template), as a user would download one."""
    tokenizer, model = tiny_tokenizer(style), tiny_model(architecture)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder

"""A Hugging Face directory of a Llama or a Mixtral as GGUF, in bfloat16 and as llama.cpp itself quantises it.

    llama_files.py DIRECTORY OUT FORMAT...

Needs numpy, gguf and llama_cpp, and no torch. There is no tokenizer: the programs are given ids.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
from llama_weights import divisors, interleaved, stacked, target, tensors

# What the layers' matrices are, and the table of tokens, which is the head too (None: as llama-quantize chooses).
FORMATS: dict[str, tuple[int, int | None]] = {
    "bf16": (llama_cpp.LLAMA_FTYPE_MOSTLY_BF16, None),
    "f16": (llama_cpp.LLAMA_FTYPE_MOSTLY_F16, None),
    "q8_0": (llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, None),  # table: Q8_0
    "q4_0": (llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0, None),  # table: Q6_K
    "q4_0-all": (llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0, llama_cpp.GGML_TYPE_Q4_0),
}


def write(directory: Path, out: Path) -> None:
    """The directory's weights in bfloat16; norms and routers in float32, as llama.cpp wants
    them."""
    hf = json.loads((directory / "config.json").read_text())
    heads, kv_heads, dim = hf["num_attention_heads"], hf["num_key_value_heads"], hf["hidden_size"]
    head_dim = hf.get("head_dim") or dim // heads
    writer = gguf.GGUFWriter(out, "llama")
    writer.add_context_length(hf["max_position_embeddings"])
    writer.add_embedding_length(dim)
    writer.add_block_count(hf["num_hidden_layers"])
    writer.add_feed_forward_length(hf["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(hf["rope_theta"])
    writer.add_layer_norm_rms_eps(hf["rms_norm_eps"])
    writer.add_vocab_size(hf["vocab_size"])
    if (experts := hf.get("num_local_experts")) is not None:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(hf["num_experts_per_tok"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_tokenizer_model("no_vocab")
    if (scaling := hf.get("rope_scaling")) is not None:
        if scaling["rope_type"] != "llama3":
            raise ValueError(f"rope_scaling {scaling['rope_type']!r} is not written as GGUF here; only llama3")
        writer.add_tensor("rope_freqs.weight", divisors(hf["rope_theta"], head_dim, scaling))
    for name, weight in stacked(tensors(directory / "model.safetensors")):
        if weight.ndim == 1 or name.endswith("block_sparse_moe.gate.weight"):  # norms and routers
            writer.add_tensor(target(name), (weight.astype(np.uint32) << 16).view(np.float32))
            continue
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            weight = interleaved(weight, heads if "q_proj" in name else kv_heads)
        writer.add_tensor(target(name), weight, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantise(source: Path, out: Path, name: str, threads: int) -> None:
    """As the tool llama-quantize does."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, table = FORMATS[name]
    params.nthread = threads
    if table is not None:
        params.token_embedding_type = params.output_tensor_type = table
    if llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(params)) != 0:
        raise ValueError(f"llama.cpp could not make {out.name}")


def main() -> None:
    directory, out, names = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    source = out / "bf16.gguf"
    for name in ("bf16", *names):
        file = out / f"{name}.gguf"
        if file.exists():
            continue
        part = file.with_suffix(".part")
        write(directory, part) if name == "bf16" else quantise(source, part, name, threads=2)
        part.rename(file)


if __name__ == "__main__":
    main()

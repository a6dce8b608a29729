"""A model folder as both engines load it, made of a GGUF file: weights in bfloat16, configuration and tokenizer from metadata.

usage: python gguf_model.py MODEL.gguf FOLDER
Llama's architecture (SmolLM2 too); needs transformers and gguf.
"""

from __future__ import annotations

import sys
from pathlib import Path


def main(source: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    config = loaded.config
    config.architectures = ["LlamaForCausalLM"]
    if hasattr(config, "quantization_config"):  # the weights are plain from here on
        del config.quantization_config
    model = LlamaForCausalLM(config)
    model.load_state_dict(loaded.state_dict())
    model.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(folder)
    print("written", folder)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("\n".join((__doc__ or "").splitlines()[2:3]))
    main(Path(sys.argv[1]), Path(sys.argv[2]))

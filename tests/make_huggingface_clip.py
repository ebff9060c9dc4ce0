"""Write tests/huggingface_clip: a tiny CLIP saved by Hugging Face's transformers, and what it computes.

pip install transformers && python tests/make_huggingface_clip.py

The tests only read the folder, so transformers is no dependency of this package. The stored files were written with
transformers 5.24.0 and torch 2.14.1. All weights are random; two vision heads and four text heads of unequal widths,
three text layers and two vision layers make sure that nothing is mixed up.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPModel

FOLDER = Path(__file__).resolve().parent / "huggingface_clip"
LAST = 63  # the token that ends a text, the largest number of the vocabulary
CONFIG = {
    "projection_dim": 12,
    "vision_config": {
        **{"hidden_size": 24, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 2},
        **{"image_size": 24, "patch_size": 8, "projection_dim": 12},
    },
    "text_config": {
        **{"hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4},
        **{"vocab_size": LAST + 1, "max_position_embeddings": 10, "projection_dim": 12},
        **{"bos_token_id": LAST - 1, "eos_token_id": LAST, "pad_token_id": 0},
    },
}


def embedding(output: object) -> torch.Tensor:
    """The projected embedding, which newer versions return inside an object."""
    return output if isinstance(output, torch.Tensor) else output.pooler_output


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(**CONFIG)).eval()
    for name, parameter in model.named_parameters():  # so that biases, norms and position embeddings count
        parameter.add_(0.3 * torch.randn_like(parameter) * (name != "logit_scale"))
    model.save_pretrained(FOLDER)
    (FOLDER / "generation_config.json").unlink(missing_ok=True)
    images = torch.randn(3, 3, 24, 24)
    tokens = torch.randint(1, LAST - 1, (5, 10))
    tokens[:, 0] = LAST - 1
    for row, length in enumerate((4, 10, 2, 7, 9)):
        tokens[row, length - 1] = LAST
        tokens[row, length:] = 0
    vectors = {
        "images": images,
        "tokens": tokens,
        "image_embeddings": embedding(model.get_image_features(pixel_values=images)),
        "text_embeddings": embedding(model.get_text_features(input_ids=tokens)),
    }
    save_file({name: value.contiguous() for name, value in vectors.items()}, FOLDER / "vectors.safetensors")


if __name__ == "__main__":
    main()

"""A sentence encoder of Hugging Face: a dict of tensors in, padded sentences and all.

Random weights and token ids, so that nothing is downloaded; yours comes from from_pretrained, with a tokenizer and
a few hundred sentences.
"""

import torch
from transformers import BertConfig, BertModel

import intrafusion

torch.manual_seed(0)
config = BertConfig(
    vocab_size=500,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=256,
    attn_implementation="eager",
)
model = BertModel(config, add_pooling_layer=False).eval()


def sentences(count: int, length: int = 12) -> dict[str, torch.Tensor]:
    """What a tokenizer gives: ids, and a mask that says where a sentence has ended."""
    lengths = torch.randint(4, length + 1, (count, 1))
    mask = (torch.arange(length) < lengths).long()
    return {"input_ids": torch.randint(1, 500, (count, length)) * mask, "attention_mask": mask}


batches = [sentences(16) for _ in range(4)]
small = intrafusion.compress(model, sentences(2), keep=0.5, inputs=batches)
print(small)

embedded = small.model(**batches[0]).last_hidden_state
assert embedded.shape == (16, 12, 64)

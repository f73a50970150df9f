"""A language model of the Llama family: the gated MLPs become narrower, and it goes on generating.

Random weights, so that nothing is downloaded; use from_pretrained and a few dozen texts.
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import intrafusion

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=300,
    hidden_size=64,
    intermediate_size=176,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=False,
)
model = LlamaForCausalLM(config).eval()
texts = [{"input_ids": torch.randint(300, (8, 32)), "use_cache": False} for _ in range(4)]

small = intrafusion.compress(model, texts[0], keep=0.5, inputs=texts)
print(small)

prompt = torch.randint(300, (1, 5))
told = small.model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=10, do_sample=False)
assert told.shape[1] > prompt.shape[1]

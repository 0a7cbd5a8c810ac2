"""A Llama-family decoder of few power-of-two terms on Python's language reference.

python -m experiments.run --exp=stp_decoder_lm

Characters, from scratch: RMSNorm, rotary positions, grouped-query attention, SwiGLU and tied
embeddings (Touvron et al., arXiv:2302.13971). Some ten minutes of a busy CPU; float 63.5 % of the
next characters in the test text with seed 0 (Python 3.11's, 5759 training and 756 test windows).
By gates the whole network takes more energy than on an int8 array of simple PEs: attention's
products and the head, which is tied to the embedding, keep all terms.
``embeddings=true check_integers=false`` has the head in the budgets.
"""

from experiments.config import Config

CONFIG = Config(
    data="python_docs",
    window=64,
    model="decoder_lm",
    width=64,
    model_options={"depth": 3, "heads": 4, "kv_heads": 2, "hidden": 176},
    optimizer="adamw",
    batch_size=64,
    eval_batch_size=128,
    float_epochs=6,
    retrain_epochs=1.25,
    float_lr=5e-3,
    guided_lr=1e-3,
    retrain_lr=2e-3,
    weight_decay=0.01,
)

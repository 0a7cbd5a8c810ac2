"""A Llama-family decoder of few power-of-two terms on Python's language reference.

python -m experiments.run --exp=stp_decoder_lm

Characters, from scratch: RMSNorm, rotary positions, grouped-query attention, SwiGLU and tied
embeddings (Touvron et al., arXiv:2302.13971). Ten minutes on two busy CPU cores with seed 0 and
``guided_epochs=0.25 retrain_epochs=1`` gave as test accuracy of the next character (Python 3.11's
text, 5759 training and 756 test windows) float 63.5 %, int8 63.4 %, projected 49.4 % and retrained
61.7 % at 0.75 terms per weight. Computational energy saving 1.80× by the table and 0.90×, a loss,
by gates: attention's products and the head, which is tied to the embedding, keep all terms. With
the head in the budgets (``embeddings=true check_integers=false``): 61.3 %, 1.98× and 0.97×.
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
    error_weighting="measured",
)

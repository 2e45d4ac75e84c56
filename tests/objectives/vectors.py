"""Golden numbers of the losses, from ../shared/specs/loss_vectors.json: copied, so that a clone has them."""

from __future__ import annotations

LOGITS = [
    [2.0, 0.0, -1.0, 0.5],
    [0.1, 0.2, 0.3, 0.4],
    [1.0, -1.0, 0.0, 2.0],
    [0.0, 3.0, 0.0, 0.0],
    [5.0, 5.0, 5.0, 5.0],
]
TOKENS = [0, 3, 2, 3, 1]  # the second is a prompt token: label -100 in the source
MASK = [True, False, True, True, True]
TOKEN_LOGPS = [0.0, 0.0, -1.342535529, -0.4401896986, -0.1392063142]
TOKEN_LOGPS_SUM = -1.921931542
ENTROPY_MEAN = 0.9522228566
COLD_LOGPS = [0.0, 0.0, -1.327584205, -0.2706738307, -0.04046163539]  # at temperature 0.7
Z_LOSS_MEAN = 0.0006169021671  # at weight 1e-4

NLL = [[0.5, 1.5, 0.0, 0.0], [1.0, 2.0, 3.0, 4.0]]
NLL_MASK = [[True, True, False, False], [True, True, True, True]]
TOKEN_MEAN = 2.0
DFT_MEAN = 0.2498557231

SEGMENTS = [1, 1, 1, 2, 2, 0]
POSITIONS = [0, 1, 2, 0, 1, 0]
ALLOWED = [
    [1, 0, 0, 0, 0, 0],
    [1, 1, 0, 0, 0, 0],
    [1, 1, 1, 0, 0, 0],
    [0, 0, 0, 1, 0, 0],
    [0, 0, 0, 1, 1, 0],
    [0, 0, 0, 0, 0, 0],
]
TARGETS = [0, 1, 1, 0, 1, 0]  # the source's shifted mask [1, 1, 0, 1, 0], at the token that is predicted

NEFTUNE = {"length": 32, "size": 64, "alpha": 5.0, "magnitude": 0.1104854346}

LORA = {
    "x": [1.0, -2.0],
    "kernel": [[0.5, -1.0, 2.0], [1.5, 0.25, -0.5]],
    "a": [[0.1, 0.2], [0.3, -0.4]],
    "b": [[1.0, 0.0, -1.0], [0.5, 2.0, 0.25]],
    "alpha": 4.0,
    "rank": 2,
    "base": [-2.5, -1.5, 3.0],
    "lora": [-2.5, 2.5, 4.5],
    "rslora": [-2.5, 4.156854249, 5.121320344],
    "merged": [[0.9, -0.2, 1.9], [1.7, -1.35, -1.3]],
}

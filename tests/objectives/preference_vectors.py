"""Golden numbers of the losses over pairs, from ../shared/specs/loss_vectors.json: copied, so that a clone
has them. Every list is one number a pair of the fixture."""

from __future__ import annotations

from typing import Any

from jaxalign.objectives import pairwise as p
from jaxalign.objectives import reference_free as r

FIXTURE: dict[str, list[float]] = {
    "pi_w": [-12.0, -20.0],
    "pi_l": [-15.0, -18.0],
    "ref_w": [-13.0, -19.5],
    "ref_l": [-14.0, -18.5],
    "len_w": [6.0, 10.0],
    "len_l": [5.0, 9.0],
}

# name of the vector: (objective, name within its `expected`, or None; the pair's margins)
CASES: dict[str, tuple[Any, str | None, list[float]]] = {
    "dpo": (p.DPO(beta=0.1), None, []),
    "cdpo": (p.ConservativeDPO(beta=0.1, label_smoothing=0.1), None, []),
    "robust_dpo": (p.RobustDPO(beta=0.1, label_smoothing=0.1), None, []),
    "hinge_rso": (p.Hinge(beta=0.1), None, []),
    "ipo_sum": (p.IPO(beta=0.1, length_norm=False), None, []),
    "ipo_length_norm": (p.IPO(beta=0.1), None, []),
    "exo_pair": (p.EXO(beta=0.1, label_smoothing=1e-3), None, []),
    "nca_pair": (p.NCA(beta=0.1), None, []),
    "bco_pair": (p.BCOPair(beta=0.1), None, []),
    "sppo_hard": (p.SPPO(beta=0.1), None, []),
    "apo_zero": (p.APOZero(beta=0.1), None, []),
    "apo_down": (p.APODown(beta=0.1), None, []),
    "discopop": (p.DiscoPOP(beta=0.1, temperature=0.05), None, []),
    "sigmoid_norm": (p.SigmoidNorm(beta=0.1), None, []),
    "fdpo_forward_kl": (p.FDPO(beta=0.1, divergence="forward_kl"), None, []),
    "fdpo_js": (p.FDPO(beta=0.1, divergence="js"), None, []),
    "fdpo_alpha_0.5": (p.FDPO(beta=0.1, divergence="alpha", alpha=0.5), None, []),
    "dpop": (p.DPOP(beta=0.1, penalty=5), "lam5", []),
    "dpop ": (p.DPOP(beta=0.1, penalty=50), "lam50", []),
    "odpo": (p.ODPO(beta=0.1), "log", [0.7, 0.1]),
    "odpo ": (p.ODPO(beta=0.1, scale="identity"), "identity", [0.7, 0.1]),
    "npo": (p.NPO(beta=0.1), None, []),
    "slic_hf": (r.SLiCHF(beta=1.0, regularization=0.1), "total", []),
    "cpo": (r.CPO(beta=0.1, alpha=0.0), "pref", []),
}

EXPECTED: dict[str, list[float]] = {
    "dpo": [0.5981388694, 0.7443966601],
    "exo_pair": [2.422014621, 2.935004271],
    "ipo_length_norm": [21.46777778, 26.06669753],
    "discopop": [0.8147631411, 0.7874020058],
    "dpop ": [0.5981388694, 2.671644692],
    "odpo": [0.4530555225, 0.1048257553],
    "npo": [12.8879332, 14.36919296],
    "slic_hf": [1.2, 5.0],
}

# names of the gradient table that differ from those above
GRADIENTS = {"dpop": "dpop_lam5", "odpo": "odpo_log", "cpo": "cpo_pref"}

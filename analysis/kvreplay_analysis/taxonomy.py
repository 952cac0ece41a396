"""Kinds of heads, by where they look in the uncompressed cache (docs/metrics.md has the statistics).

    ka.taxonomy.types(results)                    # one row per head, with its head_type
    results.only(head_type="retrieval")           # every table, figure and comparison on these heads alone

That some heads live on the first tokens and the latest ones is StreamingLLM's observation (arXiv:2309.17453), that a
few others fetch tokens from far away that of retrieval heads (arXiv:2404.15574); DuoAttention (arXiv:2410.10819) keeps
the whole cache for the latter alone. Those works find their heads by training or by tests of copying; here a head is
known by its attention in the trace alone, so a type is a description of this text, not a property proved of the model.
"""

import numpy as np

from .results import HEAD_STATISTICS

TYPES = ("sink", "local", "retrieval", "diffuse")
FAR = 0.3            # attention on neither the first nor the latest tokens, from which on a head looks far
CONCENTRATION = 0.4  # share of the far attention on its largest hundredth, from which on it looks for something


def classify(heads, far=FAR, concentration=CONCENTRATION):
    """head_type of each row of a frame with the columns sink, local, far and concentration:

    sink, local    far attention below `far`: by whether the first or the latest tokens get more (equal: sink)
    retrieval      far attention, of which the largest hundredth of the tokens holds `concentration` or more
    diffuse        far attention spread over more tokens than that
    """
    near = np.where(heads["sink"] >= heads["local"], "sink", "local")
    away = np.where(heads["concentration"] >= concentration, "retrieval", "diffuse")
    return np.where(heads["far"] < far, near, away).astype(object)


def types(results, far=FAR, concentration=CONCENTRATION):
    """One row per trace, layer, kv_head and q_head: the statistics and head_type. The statistics are means over the
    traces of a model, so that a head has one type; Absent where the results do not have them."""
    heads = results.heads.copy()
    models = {t.get("stem"): t.get("model_name") or "" for t in results.run.get("traces", []) if isinstance(t, dict)}
    heads["model"] = heads["trace"].map(lambda t: models.get(t, ""))
    means = heads.groupby(["model", "layer", "q_head"], sort=False)[HEAD_STATISTICS].transform("mean")
    heads[HEAD_STATISTICS] = means
    heads["head_type"] = classify(heads, far, concentration)
    return heads


def with_types(results, **thresholds):
    """The summary's rows of query heads with a column head_type, for grouping."""
    def merged():
        found = types(results, **thresholds)[["trace", "layer", "q_head", "head_type"]]
        rows = results.summary[results.summary["q_head"] >= 0]
        return rows.merge(found, on=["trace", "layer", "q_head"], how="left")

    return results.once(("with_types", *sorted(thresholds.items())), merged)

"""What the numbers of a run are pooled over: its traces together, and each alone."""

N_TRACES_ALONE = 12  # more traces than this are shown pooled only


def scopes(results):
    """[(title, Results)]: what numbers are pooled over. Traces of different models are never pooled.

    The first is what the page opens on and what the PDF and SVG show: all traces where they are of one model, else
    the first trace of the run.
    """
    models = {}
    by_stem = {t.get("stem"): t for t in results.run.get("traces", [])}
    for trace in results.traces:
        model = by_stem.get(trace, {}).get("model_name") or by_stem.get(trace, {}).get("name") or ""
        models.setdefault(model, []).append(trace)
    pooled = [(f"{model or 'all'}: {len(traces)} traces pooled", results.only(trace=traces))
              for model, traces in models.items() if len(traces) > 1]
    alone = [(trace, results.only(trace=trace)) for trace in results.traces]
    if len(alone) > N_TRACES_ALONE:
        alone = [(t, r) for t, r in alone if len(models) > 1 and any(ts == [t] for ts in models.values())]
    return pooled + alone if len(models) == 1 else alone + pooled

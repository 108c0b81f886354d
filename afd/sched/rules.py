"""Numbers by which each attention worker decides and the coordinator plans: a plan offers what workers would take."""

HEADROOM = 0.9  # share of a target that may be planned with: the rest is for what no model knows
TRIAL_WORSE = 1.25  # numbers of streams predicted worse than that, against the best, are not tried

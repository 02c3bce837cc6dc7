"""What is the gradient? Pure functions on flat tensors: nothing here knows a model, a prompt or a method.

- `targets`: log-linear and arithmetic targets over roles; `divergence`: distances to them, whole vocabulary;
- `support`: the same on a few tokens; `sampled`: on the sampled token alone, and what an advantage is;
- `advantage`: rewards to advantages by group; `surrogate`: policy-gradient losses per token;
- `aggregate`: the one place that averages; `head`, `vocabulary`: from hidden states, in tiles.
"""

"""The value store: a persistent Beta posterior per prompt, the sampler, admission, and the ledger of all leases.

Reading order: `posterior`, `sampler`, `admission` (pure), then `memory` and `store` (one writer), then `loops`.
"""

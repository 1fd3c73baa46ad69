"""The sandbox gateway: runs model-written Python, statelessly, hundreds at a time, and assumes that it is hostile.

Read in this order: ``inside/lockdown.py`` (the isolation and the threat model), ``inside/zygote.py`` (one fork per
run), ``policy.py`` (the permitted system calls), ``view.py`` (what the jail sees), ``jail.py`` (a run as the gateway
holds it), ``execution.py`` (one run from request to verdict), ``app.py`` (the API).
"""

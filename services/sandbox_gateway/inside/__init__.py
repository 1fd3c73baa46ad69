"""What runs inside the jail: the zygote, the lock-down of each run, and the runner of the snippet.

These files import the standard library only and nothing of Singlestream: inside the jail nothing else of it is visible.
``lockdown`` is the privileged part; ``messages`` is also imported by the gateway, so that both ends read one
definition.
"""

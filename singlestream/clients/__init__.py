"""Typed clients of the services' HTTP interfaces."""

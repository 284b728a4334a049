"""Hostile input on a live llorch: what is sent, what may come back, and the attack itself."""

"""Policies of strangers, a page each: what a plug-in looks like, from its file to its tests."""

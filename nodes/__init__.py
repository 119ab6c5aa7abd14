"""Nodes of ComfyUI's V3 API: sockets, widgets and tooltips. The methods themselves are in the packages below."""

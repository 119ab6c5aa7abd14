"""V3 node schemas. What the nodes do is in the packages below; here are sockets, widgets and words."""

"""How ranks are arranged, found and driven: mesh, engines, precision."""

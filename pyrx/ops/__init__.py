"""Every op's schema, fake, autograd formula and public function, one file a row."""

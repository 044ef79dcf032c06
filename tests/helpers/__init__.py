"""What several test modules share and is no fixture. Test modules import from here, never from each other."""

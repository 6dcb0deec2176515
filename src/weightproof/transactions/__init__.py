"""The steps of a session: an edit or a training window, its checks, its record, its rollback."""

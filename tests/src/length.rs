//! How long tests run: as in CI, or longer by `scripts/test full`.

/// `short` in CI, `full` where TOWPATH_TEST_LENGTH=full.
pub fn pick<T>(short: T, full: T) -> T {
    if std::env::var("TOWPATH_TEST_LENGTH").is_ok_and(|length| length == "full") { full } else { short }
}

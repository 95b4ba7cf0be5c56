//! Leaving out one labelled step at a time must lose something in some state.

//! netstack.

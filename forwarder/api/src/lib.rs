//! What crosses a border of Portway: the control API's JSON and the agent protocol. Types only.
//!
//! Fields are snake_case and only ever added to; a listing is one JSON array.

pub mod control;

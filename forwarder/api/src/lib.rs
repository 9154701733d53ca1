//! What crosses a border of Portway: the control API's JSON and the agent protocol, with its framing.
//!
//! Fields are snake_case and only ever added to; a listing is one JSON array.

pub mod agent;
pub mod control;

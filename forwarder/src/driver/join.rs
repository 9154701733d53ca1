//! VMs that come and go while the network runs.
//!
//! Each has a link of its own, whose place and port of the switch are taken again when it has gone.

use portway_api::control::PortInfo;
use portway_netstack::{Offloads, PortConfig, PortId};

use super::{Driver, Kind, token};
use crate::config::LinkConfig;
use crate::link::{Link, Tokens};
use crate::publish::spec::{GuestName, PublishSpec};
use crate::request::JoinError;

/// VMs that may have joined at once.
pub(crate) const JOINED: usize = 256;

impl Driver {
    /// Makes a link for one more VM and publishes its ports; all of it, or nothing.
    pub(super) fn join(
        &mut self,
        config: &LinkConfig,
        publish: Vec<PublishSpec>,
    ) -> Result<(PortId, Vec<PortInfo>), JoinError> {
        let name = config.name.clone().ok_or(JoinError::NoName)?;
        if self.links.iter().any(|link| !link.ended && link.name.as_ref() == Some(&name)) {
            return Err(JoinError::Name(name));
        }
        if let Some(ip) = config.ip
            && let Some(other) = self.links.iter().find(|link| !link.ended && link.ip == Some(ip))
        {
            return Err(JoinError::Address(ip, other.label()));
        }
        let configured = self.link_configs.len();
        let place = (configured..self.links.len()).find(|i| self.links[*i].ended);
        if place.is_none() && self.links.len() - configured >= JOINED {
            return Err(JoinError::Limit(JOINED));
        }
        let index = place.unwrap_or(self.links.len());
        let address = config.ip;
        let port_config =
            PortConfig { name: Some(name.clone()), mtu: config.mtu, address, isolate: config.isolate };
        let port = match place {
            Some(i) => {
                let port = self.links[i].port;
                self.stack.set_port(self.now, port, port_config);
                port
            }
            None => self.stack.add_port(self.now, port_config, Offloads::default()),
        };
        let tokens =
            Tokens { first: token(Kind::Link, index * Tokens::COUNT), step: 1 << super::TOKEN_SHIFT };
        let opened = Link::open(config, port, tokens, self.poll.registry());
        // A port that was added has to have a link, even one that could not be made: its place is taken again.
        let (link, fault) = match opened {
            Ok(link) => (link, None),
            Err(error) => (Link::none(config, port, tokens), Some(JoinError::Link(error.to_string()))),
        };
        if index < self.links.len() {
            self.links[index] = link;
        } else {
            self.links.push(link);
        }
        if let Some(fault) = fault {
            return Err(fault);
        }
        let mut published = Vec::new();
        for mut spec in publish {
            if spec.guest == GuestName::Default {
                spec.guest = GuestName::Name(name.clone());
            }
            for result in self.publish(&spec) {
                match result {
                    Ok(port) => published.push(port),
                    Err(error) => {
                        self.leave(port);
                        return Err(error.into());
                    }
                }
            }
        }
        tracing::info!(vm = name, "a VM joins");
        self.note_link_up(index, false);
        Ok((port, published))
    }

    /// Takes a VM's link and ports away.
    pub(super) fn leave(&mut self, port: PortId) {
        let configured = self.link_configs.len();
        let Some(index) = (configured..self.links.len()).find(|i| self.links[*i].port == port) else {
            return;
        };
        let Some(link) = self.links.get_mut(index).filter(|link| !link.ended) else { return };
        self.stack.port_down(port);
        link.remove(self.poll.registry());
        let name = link.label();
        // It may come back in another place.
        link.name = None;
        tracing::info!(vm = name, "a VM leaves");
        for slot in 0..self.published.len() {
            let of_vm = |guest: &GuestName| matches!(guest, GuestName::Name(n) if *n == name);
            // What it published itself goes with it, too: its address may be another's soon.
            let by_vm = |p: &crate::publish::Published| p.by.is_some_and(|(_, link)| link == Some(port));
            if self.published[slot].as_ref().is_some_and(|p| of_vm(&p.guest) || by_vm(p)) {
                self.close_entrances(slot);
                self.published[slot] = None;
            }
        }
        self.events.push(crate::events::Event::LinkDown(name));
    }
}

//! VMs that come by themselves: to a listener that takes several, or through the API.

use portway_netstack::{Mac, Offloads, PortConfig};

use super::{Driver, Kind, TOKEN_SHIFT, token};
use crate::config::LinkConfig;
use crate::link::{Link, Tokens};

/// VMs beyond the first that the listeners of `vpnkit` links may have together.
const ARRIVALS: usize = 64;

impl Driver {
    /// The MAC of a guest that came by a handshake, or why it may not come in.
    pub(super) fn admit(&mut self, hello: crate::link::vpnkit::Hello) -> Result<Mac, String> {
        let uuid = hello.uuid.map(|u| String::from_utf8_lossy(&u).to_ascii_lowercase());
        let known = self.vpnkit_macs.iter().find(|(u, _)| uuid.as_ref() == Some(u));
        let mac = known.map_or_else(|| hello.mac(), |(_, mac)| *mac);
        if let Some(ip) = hello.address {
            self.stack.prefer_address(self.now, mac, ip).map_err(|e| e.to_string())?;
        }
        Ok(mac)
    }

    /// Makes links of the VMs that came to the listener of link `n`.
    pub(super) fn welcome(&mut self, n: usize) {
        while let Some(fd) = self.links[n].take_arrival() {
            let Some(config) = self.link_configs.get(n).cloned() else { return };
            self.attach(&config, fd);
        }
    }

    /// Makes a link like `config` of a VM that came by `fd`. At the limit it is sent away.
    pub(super) fn attach(&mut self, config: &LinkConfig, fd: std::os::fd::OwnedFd) -> bool {
        // The place of one that is gone, or a new one.
        let configured = self.link_configs.len();
        let place = (configured..self.links.len())
            .find(|i| self.links[*i].ended && self.links[*i].mtu() == config.mtu);
        if place.is_none() && self.links.len() - configured >= ARRIVALS {
            tracing::warn!(most = ARRIVALS, "too many VMs came by themselves: one was sent away");
            return false;
        }
        let index = place.unwrap_or(self.links.len());
        let port = match place {
            Some(i) => self.links[i].port,
            None => {
                let isolate = config.isolate;
                let port = PortConfig { name: None, mtu: config.mtu, address: None, isolate };
                self.stack.add_port(self.now, port, Offloads::default())
            }
        };
        let tokens = Tokens { first: token(Kind::Link, index * Tokens::COUNT), step: 1 << TOKEN_SHIFT };
        match Link::arrived(config, port, tokens, fd, self.poll.registry()) {
            Ok(link) if index < self.links.len() => self.links[index] = link,
            Ok(link) => self.links.push(link),
            Err(error) => {
                tracing::warn!(%error, "a VMM could not be attached");
                return false;
            }
        }
        if !self.captures.is_empty() {
            self.tap_links();
        }
        self.note_link_up(index, false);
        true
    }
}

//! A link and, at its other end, a front end with a guest's driver.

use std::ops::{Deref, DerefMut};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vhost::VhostBackend;
use vhost::vhost_user::Frontend;

use super::super::*;
use crate::vhost_user::lab::Driver;
pub(super) use crate::vhost_user::lab::{BUFFERS, GUEST, Piece, REGION, SIZE};

pub(super) const ALL: u64 = feature::OFFERED;

pub(super) struct Lab {
    pub(super) link: VhostUser,
    pub(super) driver: Driver<2>,
}

impl Deref for Lab {
    type Target = Driver<2>;

    fn deref(&self) -> &Driver<2> {
        &self.driver
    }
}

impl DerefMut for Lab {
    fn deref_mut(&mut self) -> &mut Driver<2> {
        &mut self.driver
    }
}

/// Lets the front end talk while the link answers.
pub(super) fn talk<T: Send>(
    link: &mut VhostUser,
    front: &mut Frontend,
    say: impl FnOnce(&mut Frontend) -> T + Send,
) -> (T, io::Result<Changes>) {
    crate::vhost_user::lab::talk(front, say, || {
        let mut fds = [PollFd::new(link.front.socket().as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::from(1u8)).unwrap();
        link.handle_control().inspect_err(|_| {
            // The front end must not wait for ever.
            link.front.socket().shutdown(std::net::Shutdown::Both).unwrap();
        })
    })
}

impl Lab {
    /// A device set up with `features`, running.
    pub(super) fn new(features: u64) -> Self {
        let mut lab = Self::connected(features);
        let changes = lab.set_up();
        assert_eq!(changes, Changes { kicks: true, device: true, more: false });
        lab
    }

    /// A front end that has said nothing yet.
    pub(super) fn connected(features: u64) -> Self {
        let (ours, theirs) = UnixStream::pair().unwrap();
        Self { link: VhostUser::new(ours, 1500).unwrap(), driver: Driver::new(theirs, features) }
    }

    pub(super) fn table(queue: usize) -> u64 {
        Driver::<2>::table(queue)
    }

    pub(super) fn config(queue: usize) -> vhost::VringConfigData {
        Driver::<2>::config(queue)
    }

    /// Features and memory, then both rings.
    pub(super) fn set_up(&mut self) -> Changes {
        let (infos, features) = (self.infos(), self.features);
        let (said, first) = talk(&mut self.link, &mut self.driver.front, |front| {
            Driver::<2>::negotiate(front, features, &infos)
        });
        said.unwrap();
        let first = first.unwrap();
        let second = self.start([0, 0]);
        Changes { kicks: first.kicks | second.kicks, device: first.device | second.device, more: false }
    }

    /// Starts both rings at `base`.
    pub(super) fn start(&mut self, base: [u16; 2]) -> Changes {
        let Driver { front, kick, call, .. } = &mut self.driver;
        let (said, changes) = talk(&mut self.link, front, |front| Driver::start(front, kick, call, base));
        said.unwrap();
        changes.unwrap()
    }

    /// Stops both rings and says where.
    pub(super) fn stop(&mut self) -> ([u16; 2], Changes) {
        let (bases, changes) = talk(&mut self.link, &mut self.driver.front, |front| {
            [0, 1].map(|queue| u16::try_from(front.get_vring_base(queue).unwrap()).unwrap())
        });
        (bases, changes.unwrap())
    }

    /// Kicks, as the driver of the network would hear it.
    pub(super) fn kick(&mut self, queue: usize) {
        self.link.note_kick(queue);
    }

    /// All frames that wait from the guest.
    pub(super) fn received(&mut self) -> Vec<(Vec<u8>, Offload)> {
        let mut frames = Vec::new();
        while self.link.wants_receive() {
            self.link
                .receive(|frame, offload| {
                    frames.push((frame.to_vec(), offload));
                    ControlFlow::Continue(())
                })
                .unwrap();
        }
        self.link.flush().unwrap();
        frames
    }
}

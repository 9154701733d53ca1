//! The program's own pages.
//!
//! Most of the program is what start-up needs once (the command line, configuration, the sandbox's filter) or what few ever
//! ask for (SSH, TLS, completions). The kernel maps sixteen pages around each it touches, so a process that has just started
//! has nearly all of it resident, and mapped program pages are what it reclaims last. They are given back once when all is
//! ready; what is needed again comes from the page cache, some tens of minor faults in all.

/// Gives back the pages of the program's code and constants that are mapped now.
///
/// Advice: where it is not taken, they stay.
pub(crate) fn give_back() {
    #[cfg(target_os = "linux")]
    for (start, len) in constant_segments() {
        let Some(at) = std::ptr::NonNull::new(std::ptr::with_exposed_provenance_mut(start)) else { continue };
        // SAFETY: the range is whole pages of a segment of the program that nobody may write, mapped privately from its
        // file and never relocated (position-independent code without text relocations): the next access maps the same
        // bytes of the file again (madvise(2), MADV_DONTNEED).
        let advised = unsafe { nix::sys::mman::madvise(at, len, nix::sys::mman::MmapAdvise::MADV_DONTNEED) };
        debug_assert!(advised.is_ok(), "madvise: {advised:?}");
    }
}

/// The whole pages of the program's loaded segments that are not writable: address and length in bytes.
#[cfg(target_os = "linux")]
fn constant_segments() -> Vec<(usize, usize)> {
    use nix::libc::{PF_W, PT_LOAD, dl_iterate_phdr, dl_phdr_info};

    /// Called for each object, the program itself first (dl_iterate_phdr(3)); others are left alone.
    unsafe extern "C" fn first(
        info: *mut dl_phdr_info,
        _size: usize,
        found: *mut std::ffi::c_void,
    ) -> std::ffi::c_int {
        // SAFETY: the loader's record and our vector below are both whole for the time of this call, and no other
        // reference to either is in use.
        let (info, found) = unsafe { (&*info, &mut *found.cast::<Vec<(usize, usize)>>()) };
        if info.dlpi_phdr.is_null() {
            return 1;
        }
        // SAFETY: the loader's own table of that many headers, which stays as long as the program does.
        let headers = unsafe { std::slice::from_raw_parts(info.dlpi_phdr, usize::from(info.dlpi_phnum)) };
        for header in headers.iter().filter(|h| h.p_type == PT_LOAD && h.p_flags & PF_W == 0) {
            let (Ok(base), Ok(start), Ok(len)) = (
                usize::try_from(info.dlpi_addr),
                usize::try_from(header.p_vaddr),
                usize::try_from(header.p_memsz),
            ) else {
                continue;
            };
            found.extend(whole_pages(base.wrapping_add(start), len));
        }
        // Nobody else's pages.
        1
    }

    let mut found = Vec::new();
    // SAFETY: the callback is of the type the loader calls, and the vector outlives the call.
    unsafe { dl_iterate_phdr(Some(first), (&raw mut found).cast()) };
    found
}

/// The part of a range that is whole pages; none where that is empty.
#[cfg(target_os = "linux")]
fn whole_pages(start: usize, len: usize) -> Option<(usize, usize)> {
    let page = nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE).ok()??;
    let page = usize::try_from(page).ok()?;
    let from = start.checked_next_multiple_of(page)?;
    let to = start.checked_add(len)? / page * page;
    (from < to).then(|| (from, to - from))
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn a_program_runs_on_without_its_pages_and_fewer_are_resident() {
        let resident = || {
            let status = std::fs::read_to_string("/proc/self/status").unwrap();
            let line = status.lines().find(|l| l.starts_with("RssFile:")).unwrap();
            line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap()
        };
        // Every page of it, so that there is something to give back.
        let segments = constant_segments();
        let sum = |(start, len): &(usize, usize)| {
            // SAFETY: a segment of this program, readable as long as it runs.
            let bytes =
                unsafe { std::slice::from_raw_parts(std::ptr::with_exposed_provenance::<u8>(*start), *len) };
            bytes.iter().step_by(1024).map(|&b| u64::from(b)).sum::<u64>()
        };
        let before: Vec<_> = segments.iter().map(sum).collect();
        let full = resident();
        give_back();
        let left = resident();
        assert!(left + 1024 < full, "{full} KiB before, {left} KiB after");
        let after: Vec<_> = segments.iter().map(sum).collect();
        assert_eq!(before, after, "the same bytes");
        assert!(!segments.is_empty());
    }

    #[test]
    fn only_whole_pages_are_taken() {
        assert_eq!(whole_pages(0x1010, 0x0ff0), None);
        assert_eq!(whole_pages(0x1010, 0x2ff0), Some((0x2000, 0x2000)));
        assert_eq!(whole_pages(0x1000, 0x1fff), Some((0x1000, 0x1000)));
        assert_eq!(whole_pages(usize::MAX - 5, 20), None);
    }
}

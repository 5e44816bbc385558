use crate::error::{Error, Result};
use memmap2::MmapMut;
use std::ops::{Deref, DerefMut};

/// Zeroed memory of its own, page-aligned, on 2 MiB pages where the system gives them.
#[derive(Debug, Default)]
pub struct Memory(Option<MmapMut>);

impl Memory {
    /// So many bytes.
    ///
    /// Errors: `OutOfMemory`.
    pub fn new(bytes: usize) -> Result<Self> {
        if bytes == 0 {
            return Ok(Self(None));
        }
        let map = MmapMut::map_anon(bytes).map_err(|source| Error::OutOfMemory { bytes, source })?;
        // Small pages are only slower: a system without the advice is no error.
        #[cfg(target_os = "linux")]
        let _ = map.advise(memmap2::Advice::HugePage);
        Ok(Self(Some(map)))
    }

    pub(crate) fn copy_in(&mut self, data: &[u8]) -> Result<()> {
        let available = self.len();
        match self.get_mut(..data.len()) {
            Some(part) => part.copy_from_slice(data),
            None => return Err(Error::Copy { bytes: data.len(), available }),
        }
        Ok(())
    }

    pub(crate) fn copy_out(&self, data: &mut [u8]) -> Result<()> {
        match self.get(..data.len()) {
            Some(part) => data.copy_from_slice(part),
            None => return Err(Error::Copy { bytes: data.len(), available: self.len() }),
        }
        Ok(())
    }
}

impl Deref for Memory {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        self.0.as_deref().unwrap_or(&[])
    }
}

impl DerefMut for Memory {
    fn deref_mut(&mut self) -> &mut [u8] {
        self.0.as_deref_mut().unwrap_or_default()
    }
}

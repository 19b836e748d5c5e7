//! Single packets through a loaded program, without a network.

use aya::programs::{SchedClassifier, TestRun as _, TestRunOptions};

use super::{Datapath, links};
use crate::DatapathError;

/// What a program did to a packet that never was on a wire.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trial {
    /// `TC_ACT_*`: 0 to the stack, 2 dropped, 7 redirected, -1 left to whoever comes next on the hook.
    pub verdict: i32,
    /// The packet afterwards.
    pub packet: Vec<u8>,
    /// Its mark afterwards.
    pub mark: u32,
    /// Average time per run.
    pub duration: std::time::Duration,
}

/// Where a packet that never was on a wire is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Arrival {
    /// The interface at which it arrives, or through which it leaves; 0: none.
    pub ifindex: u32,
    /// The interface through which it came to this node; 0: this node has made it.
    pub ingress_ifindex: u32,
    /// Its mark.
    pub mark: u32,
}

impl Datapath {
    /// Runs an interface program `repeat` times on a frame. Maps are the real ones, so it counts; but
    /// nothing is sent.
    ///
    /// # Errors
    /// [`DatapathError::Attach`] if there is no such program, or the kernel refuses the frame (it
    /// wants 14 bytes at least).
    pub fn trial(
        &self,
        program: &str,
        frame: &[u8],
        arrival: Arrival,
        repeat: u32,
    ) -> Result<Trial, DatapathError> {
        let failed = |reason: String| DatapathError::Attach {
            program: program.to_owned(),
            target: "a trial packet".to_owned(),
            reason,
        };
        let loaded =
            self.programs.program(program).ok_or_else(|| failed("there is no such program".to_owned()))?;
        let loaded = <&SchedClassifier>::try_from(loaded).map_err(|error| failed(error.to_string()))?;
        // struct __sk_buff: these are its third, tenth and eleventh word.
        let mut context = [0_u8; 192];
        context[8..12].copy_from_slice(&arrival.mark.to_ne_bytes());
        context[36..40].copy_from_slice(&arrival.ingress_ifindex.to_ne_bytes());
        context[40..44].copy_from_slice(&arrival.ifindex.to_ne_bytes());
        let mut after = [0_u8; 192];
        let mut packet = vec![0; frame.len() + 256];
        let result = loaded
            .test_run(TestRunOptions {
                data_in: Some(frame),
                data_out: Some(&mut packet),
                ctx_in: Some(&context),
                ctx_out: Some(&mut after),
                repeat,
                ..TestRunOptions::new()
            })
            .map_err(|error| failed(links::describe(&error)))?;
        packet.truncate(result.data_size_out as usize);
        let mark = u32::from_ne_bytes([after[8], after[9], after[10], after[11]]);
        Ok(Trial { verdict: result.return_value.cast_signed(), packet, mark, duration: result.duration })
    }
}

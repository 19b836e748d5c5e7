//! Single packets through a loaded program, without a network.

use aya::programs::{Program, ProgramError, TestRun as _, TestRunOptions, TestRunResult};

use super::{Datapath, links};
use crate::DatapathError;

/// What a program did to a packet that never was on a wire.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trial {
    /// `TC_ACT_*`: 0 to the stack, 2 dropped, 7 redirected, -1 left to whoever comes next on the hook. Of `cm_xdp` `XDP_*`:
    /// 2 left to the kernel, 3 sent back through its interface.
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
        // struct __sk_buff: these are its third, tenth and eleventh word.
        let mut context = [0_u8; 192];
        let mut length = context.len();
        context[8..12].copy_from_slice(&arrival.mark.to_ne_bytes());
        context[36..40].copy_from_slice(&arrival.ingress_ifindex.to_ne_bytes());
        context[40..44].copy_from_slice(&arrival.ifindex.to_ne_bytes());
        if matches!(loaded, Program::Xdp(_)) {
            // struct xdp_md: the packet's bounds, and as its fourth word the interface.
            context = [0; 192];
            length = 24;
            let size = u32::try_from(frame.len()).map_err(|error| failed(error.to_string()))?;
            context[4..8].copy_from_slice(&size.to_ne_bytes());
            context[12..16].copy_from_slice(&arrival.ifindex.to_ne_bytes());
        }
        let mut after = [0_u8; 192];
        let mut packet = vec![0; frame.len() + 256];
        let options = TestRunOptions {
            data_in: Some(frame),
            data_out: Some(&mut packet),
            ctx_in: Some(&context[..length]),
            ctx_out: Some(&mut after[..length]),
            repeat,
            ..TestRunOptions::new()
        };
        let result = test_run(loaded, options).map_err(|error| failed(links::describe(&error)))?;
        packet.truncate(result.data_size_out as usize);
        let mark = u32::from_ne_bytes([after[8], after[9], after[10], after[11]]);
        Ok(Trial { verdict: result.return_value.cast_signed(), packet, mark, duration: result.duration })
    }
}

fn test_run(program: &Program, options: TestRunOptions<'_>) -> Result<TestRunResult, ProgramError> {
    match program {
        Program::SchedClassifier(program) => program.test_run(options),
        Program::Xdp(program) => program.test_run(options),
        _ => Err(ProgramError::UnexpectedProgramType),
    }
}

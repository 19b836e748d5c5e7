//! The servers: HTTP, UDP echo and TCP stream echo, each on IPv4 and IPv6.

use crate::{http, whoami::Whoami, whoami::canonical};
use anyhow::Context as _;
use socket2::{Domain, Protocol, Socket, Type};
use std::io::{self, ErrorKind, Read as _, Write as _};
use std::net::{Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

/// An idle or stalled caller must not hold a thread for ever.
const IO_TIMEOUT: Duration = Duration::from_secs(30);
const BACKLOG: i32 = 1024;

#[derive(clap::Args)]
pub(crate) struct ServeArgs {
    #[command(flatten)]
    who: Whoami,
    /// Port for HTTP; may be given more than once.
    #[arg(long, value_name = "PORT")]
    http: Vec<u16>,
    /// Port for UDP; may be given more than once.
    #[arg(long, value_name = "PORT")]
    udp: Vec<u16>,
    /// Port that echoes TCP streams; may be given more than once.
    #[arg(long, value_name = "PORT")]
    stream: Vec<u16>,
    /// Answer HTTP with this text; `{pod}`, `{namespace}`, `{node}` and `{cluster}` are filled in.
    #[arg(long, value_name = "TEXT", env = "MESH_PROBE_ANSWER")]
    answer: Option<String>,
    /// Answer HTTP with the text of this file, read for each answer.
    #[arg(long, value_name = "FILE", conflicts_with = "answer")]
    answer_file: Option<PathBuf>,
}

/// What HTTP requests are answered with.
#[derive(Clone)]
enum Page {
    /// Who we are.
    Whoami,
    /// The same text always.
    Text(String),
    /// What is in a file at the time.
    File(PathBuf),
}

/// Serves until killed.
pub(crate) fn run(args: &ServeArgs) -> anyhow::Result<ExitCode> {
    anyhow::ensure!(
        !(args.http.is_empty() && args.udp.is_empty() && args.stream.is_empty()),
        "nothing to serve: give at least one of --http, --udp, --stream"
    );
    let who = Arc::new(args.who.clone());
    let page = match (&args.answer, &args.answer_file) {
        (Some(text), _) => Page::Text(format!("{}\n", who.fill(text))),
        (None, Some(file)) => Page::File(file.clone()),
        (None, None) => Page::Whoami,
    };
    let mut workers = Vec::new();
    // All ports are bound before the first is served: a server that says it is up is up on all.
    for &port in &args.http {
        let listener = listen(port).with_context(|| format!("cannot listen on TCP port {port}"))?;
        let (who, page) = (who.clone(), page.clone());
        workers.push(thread::spawn(move || {
            accept_all(&listener, move |stream, peer| answer_http(&stream, peer, &who, &page))
        }));
    }
    for &port in &args.stream {
        let listener = listen(port).with_context(|| format!("cannot listen on TCP port {port}"))?;
        workers.push(thread::spawn(move || accept_all(&listener, |stream, _| echo_stream(stream))));
    }
    for &port in &args.udp {
        for socket in bind_udp(port).with_context(|| format!("cannot bind UDP port {port}"))? {
            let who = who.clone();
            workers.push(thread::spawn(move || echo_udp(&socket, &who)));
        }
    }
    println!("{} serves http {:?} udp {:?} stream {:?}", who.pod, args.http, args.udp, args.stream);
    for worker in workers {
        match worker.join() {
            Ok(result) => result?,
            Err(_) => anyhow::bail!("a server thread panicked"),
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// One socket for both families; where IPv6 is switched off, IPv4 alone.
fn listen(port: u16) -> io::Result<TcpListener> {
    let open = |domain, address: SocketAddr| -> io::Result<TcpListener> {
        let socket = Socket::new(domain, Type::STREAM, Some(Protocol::TCP))?;
        if domain == Domain::IPV6 {
            socket.set_only_v6(false)?;
        }
        socket.set_reuse_address(true)?;
        socket.bind(&address.into())?;
        socket.listen(BACKLOG)?;
        Ok(socket.into())
    };
    open(Domain::IPV6, (Ipv6Addr::UNSPECIFIED, port).into()).or_else(|error| match error.kind() {
        ErrorKind::AddrInUse | ErrorKind::PermissionDenied => Err(error),
        _ => open(Domain::IPV4, ([0, 0, 0, 0], port).into()),
    })
}

/// One socket per family: the answer to an IPv4 datagram then leaves from the very address asked.
fn bind_udp(port: u16) -> io::Result<Vec<UdpSocket>> {
    let v4 = UdpSocket::bind(("0.0.0.0", port))?;
    let v6 = Socket::new(Domain::IPV6, Type::DGRAM, Some(Protocol::UDP)).and_then(|socket| {
        socket.set_only_v6(true)?;
        socket.bind(&SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)).into())?;
        Ok(socket.into())
    });
    match v6 {
        Ok(v6) => Ok(vec![v4, v6]),
        Err(error) if error.kind() == ErrorKind::AddrInUse => Err(error),
        Err(_) => Ok(vec![v4]),
    }
}

/// Serves each connection on a thread of its own.
fn accept_all<F>(listener: &TcpListener, serve: F) -> anyhow::Result<()>
where
    F: Fn(TcpStream, SocketAddr) -> io::Result<()> + Send + Sync + 'static,
{
    let serve = Arc::new(serve);
    loop {
        // Errors of a single connection (aborted before accept) are not errors of the server.
        let Ok((stream, peer)) = listener.accept() else { continue };
        let serve = serve.clone();
        let worker = thread::Builder::new().stack_size(128 * 1024).spawn(move || {
            // The caller counts what it did not get; there is nothing to add here.
            let _ = serve(stream, peer);
        });
        if let Err(error) = worker {
            eprintln!("connection refused: no thread for it: {error}");
        }
    }
}

fn answer_http(stream: &TcpStream, peer: SocketAddr, who: &Whoami, page: &Page) -> io::Result<()> {
    stream.set_read_timeout(Some(IO_TIMEOUT))?;
    stream.set_write_timeout(Some(IO_TIMEOUT))?;
    stream.set_nodelay(true)?;
    let (method, _path) = http::read_request(stream)?;
    let answer = who.answer(canonical(peer));
    let body = match page {
        Page::Text(text) => text.clone(),
        Page::File(file) => std::fs::read_to_string(file)?,
        Page::Whoami => format!("{}\n", serde_json::to_string(&answer)?),
    };
    http::write_answer(stream, &answer, &body, method == "HEAD")
}

fn echo_stream(mut stream: TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut buffer = vec![0; 16 * 1024];
    loop {
        match stream.read(&mut buffer)? {
            0 => return Ok(()),
            length => stream.write_all(&buffer[..length])?,
        }
    }
}

/// Answers each datagram with who we are; `echo` carries the request back, so that a caller can tell
/// a late answer to an earlier call from the one it waits for.
fn echo_udp(socket: &UdpSocket, who: &Whoami) -> anyhow::Result<()> {
    let mut buffer = vec![0; 2048];
    loop {
        // ICMP errors of earlier answers surface here; they concern callers that went away.
        let Ok((length, peer)) = socket.recv_from(&mut buffer) else { continue };
        let mut answer = serde_json::to_value(who.answer(canonical(peer)))?;
        answer["echo"] = String::from_utf8_lossy(&buffer[..length]).trim_end().into();
        let _ = socket.send_to(answer.to_string().as_bytes(), peer);
    }
}

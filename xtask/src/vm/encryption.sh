#!/bin/sh
# What encryption between nodes needs of a kernel: a WireGuard device and an ESP tunnel, each between two network
# namespaces, carry what is sent through them, and nothing without the other end's keys.
fail() { echo "FAIL  $name $*"; failed=1; }
pass() { echo "PASS  $name $*"; }
in_ns() { ns=$1; shift; ip netns exec "$ns" "$@"; }
# Addresses of the tunnel; the other end's, with one try of a second and with several.
reaches() { in_ns "$1" ping -c "$3" -W 2 "$2" >/dev/null 2>&1; }
failed=0

ip netns add ea && ip netns add eb || exit 1
ip link add eth0 netns ea type veth peer name eth0 netns eb || exit 1
ip -n ea addr add 192.168.9.1/24 dev eth0
ip -n eb addr add 192.168.9.2/24 dev eth0
ip -n ea link set eth0 up
ip -n eb link set eth0 up

name=wireguard
umask 077
for ns in ea eb; do wg genkey >/tmp/$ns.key; wg pubkey </tmp/$ns.key >/tmp/$ns.pub; done
wireguard() { # namespace, own number, the other's namespace and number
    ip -n "$1" link add wg0 type wireguard || return 1
    in_ns "$1" wg set wg0 listen-port 51871 private-key "/tmp/$1.key" peer "$(cat "/tmp/$3.pub")" \
        allowed-ips "10.9.0.$4/32" endpoint "192.168.9.$4:51871" || return 1
    ip -n "$1" addr add "10.9.0.$2/24" dev wg0 && ip -n "$1" link set wg0 up
}
if wireguard ea 1 eb 2 && wireguard eb 2 ea 1; then
    reaches ea 10.9.0.2 5 || fail "nothing gets through"
    [ "$(in_ns eb wg show wg0 latest-handshakes | cut -f2)" != 0 ] || fail "no handshake"
    received=$(in_ns eb wg show wg0 transfer | cut -f2)
    [ "$received" -gt 0 ] || fail "it did not pass the tunnel"
    in_ns eb wg set wg0 peer "$(cat /tmp/ea.pub)" remove
    ! reaches ea 10.9.0.2 1 || fail "it gets through without keys"
    [ $failed = 1 ] || pass "two namespaces, $received bytes received"
else
    fail "no such device"
fi

name=esp
key=0x0102030405060708090a0b0c0d0e0f1011121314
# The state that a packet of ea's leaves by and comes to eb by.
esp() {
    ip -n "$1" xfrm state add src 192.168.9.1 dst 192.168.9.2 proto esp spi 0x1000 mode transport \
        aead 'rfc4106(gcm(aes))' "$2" 128
}
policy() {
    ip -n "$1" xfrm policy add src 192.168.9.1 dst 192.168.9.2 proto 1 dir "$2" \
        tmpl src 192.168.9.1 dst 192.168.9.2 proto esp mode transport
}
# Requests go by ESP; answers come as they are.
arrives() { reaches ea 192.168.9.2 "$1"; }
before=$failed
if esp ea $key && policy ea out && esp eb $key && policy eb in; then
    arrives 3 || fail "nothing gets through"
    ip -n eb -s xfrm state | grep -q ' [1-9][0-9]*(packets)' || fail "it did not pass the tunnel"
    ip -n eb xfrm state flush
    ! arrives 1 || fail "it gets through without keys"
    [ $failed != "$before" ] || pass "two namespaces, AES-GCM"
else
    fail "no such state"
fi
ip netns delete ea
ip netns delete eb
exit $failed

#!/bin/sh
# What encryption costs, in a guest: the mesh without it, with WireGuard and with IPsec, each beside two pods on the same two
# nodes that the kernel alone joins, by plain routing, a WireGuard tunnel, and an ESP tunnel.
# Says "figure<TAB>ENCRYPTION<TAB>WAY<TAB>JSON" for each measurement. Arguments: rounds, and seconds of each measurement.
rounds=$1 seconds=$2 lab=enc
wait="--wait-timeout 300s"
fail() {
    echo "FAIL  $*"
    tail -n 20 /tmp/bench.log
    clustermesh lab down $lab >/dev/null 2>&1
    exit 1
}
quietly() { "$@" >/tmp/bench.log 2>&1; }
in_ns() { ns=$1; shift; ip netns exec "$ns" "$@"; }

quietly clustermesh lab up topology-examples/bench/topology.yaml --name $lab --wait $wait || fail "the lab does not come up"
a=cm-$lab-alpha-node1 b=cm-$lab-beta-node1
address() { ip -n "$1" -4 -o address show | sed -n "s/.* inet \($2[0-9.]*\).*/\1/p" | head -n 1; }
a_ip=$(address $a 172.31.1.) b_ip=$(address $b 172.31.2.)
server=$(address cm-$lab-beta-bench-bulk 10.2.)

# The kernel's own pair of pods, with the MTU that pods of the mesh have.
bare() { # pod, its node, its number, the other's
    ip netns add "$1" && ip -n "$1" link set lo up &&
    ip -n "$2" link add bare type veth peer name eth0 netns "$1" &&
    ip -n "$1" link set eth0 mtu 1390 up && ip -n "$2" link set bare mtu 1390 up &&
    ip -n "$1" address add "198.18.$3.2/24" dev eth0 && ip -n "$2" address add "198.18.$3.1/24" dev bare &&
    ip -n "$1" route add default via "198.18.$3.1" &&
    in_ns "$2" sh -c 'echo 1 >/proc/sys/net/ipv4/ip_forward; echo 0 >/proc/sys/net/ipv4/conf/all/rp_filter
        for conf in /proc/sys/net/ipv4/conf/*; do echo 0 >$conf/rp_filter; done'
}
quietly bare bare-a $a 1 2 && quietly bare bare-b $b 2 1 || fail "no pods of the kernel's own"
umask 077
for ns in a b; do wg genkey >/tmp/bare-$ns.key; wg pubkey </tmp/bare-$ns.key >/tmp/bare-$ns.pub; done
tunnel() { # node, its number, the other's, own letter, the other's, the other's address
    ip -n "$1" link add bare0 type wireguard &&
    in_ns "$1" wg set bare0 listen-port 51999 private-key /tmp/bare-"$4".key peer "$(cat /tmp/bare-"$5".pub)" \
        allowed-ips "198.18.$3.0/24" endpoint "$6:51999" &&
    ip -n "$1" link set bare0 mtu 1440 up && in_ns "$1" sh -c 'echo 0 >/proc/sys/net/ipv4/conf/bare0/rp_filter'
}
quietly tunnel $a 1 2 a b "$b_ip" && quietly tunnel $b 2 1 b a "$a_ip" || fail "no WireGuard tunnel"
esp() { # node, what to do
    for way in "$a_ip $b_ip 1 2 0x2001" "$b_ip $a_ip 2 1 0x2002"; do
        set -- "$1" "$2" $way
        ip -n "$1" xfrm state "$2" src "$3" dst "$4" proto esp spi "$7" \
            $([ "$2" = add ] && echo "mode tunnel reqid 99 replay-window 32 aead rfc4106(gcm(aes)) 0x$(printf %072d "${7#0x}") 128") || return 1
        for dir in out in fwd; do
            case "$dir $1 $3" in "out $a $b_ip"|"out $b $a_ip"|"in $a $a_ip"|"in $b $b_ip"|"fwd $a $a_ip"|"fwd $b $b_ip") continue;; esac
            ip -n "$1" xfrm policy "$2" src "198.18.$5.0/24" dst "198.18.$6.0/24" dir $dir \
                $([ "$2" = add ] && echo "tmpl src $3 dst $4 proto esp reqid 99 mode tunnel") || return 1
        done
    done
}
routes() { # the device, or the other node
    case $1 in
        wireguard) ip -n $a route replace 198.18.2.0/24 dev bare0 && ip -n $b route replace 198.18.1.0/24 dev bare0 ;;
        *) ip -n $a route replace 198.18.2.0/24 via "$b_ip" && ip -n $b route replace 198.18.1.0/24 via "$a_ip" ;;
    esac
}
ip netns exec bare-b mesh-probe throughput server --port 7778 >/dev/null 2>&1 &
ip netns exec bare-b mesh-probe pingpong server --port 7777 >/dev/null 2>&1 &
pong=$(address cm-$lab-beta-bench-pingpong 10.2.)

measure() { # encryption, way, what to run a client in, address for streams and for round trips
    what=$1 way=$2 stream=$4 trips=$5
    for tool in "throughput client $stream:7778" "pingpong client $trips:7777 --mode tcp-rr --warmup 0.5"; do
        said=$(timeout 120 $3 taskset -c 1 mesh-probe $tool --seconds "$seconds" -o json 2>/tmp/bench.log | tr -d '\n') &&
            [ -n "$said" ] || fail "$what, $way: no answer over $tool"
        printf 'figure\t%s\t%s\t%s\n' "$what" "$way" "$said"
    done
}
total() { awk '{ sum += $1 } END { printf "%.0f\n", sum }'; }
# Encrypted packets and bytes that alpha's node has sent by the mesh's own means.
sent() {
    case $1 in
        wireguard) in_ns $a wg show all transfer | sed -n '/^cm_wg/p' | cut -f4 | total ;;
        ipsec) ip -n $a -s xfrm state list reqid 1129136535 | sed -n 's/^[[:space:]]*\([0-9]*\)(bytes).*/\1/p' | total ;;
        *) echo 0 ;;
    esac
}
encrypted() { # waits until both clusters say so
    for try in $(seq 120); do
        done=0
        for cluster in alpha beta; do
            clustermesh encrypt status --context $lab/$cluster -o json >/tmp/status 2>/tmp/bench.log || continue
            [ "$(grep -c "\"by\": *\"$1\"" /tmp/status)" -ge 4 ] && done=$((done + 1))
        done
        [ $done = 2 ] && return 0
        sleep 1
    done
    cp /tmp/status /tmp/bench.log
    return 1
}
for what in none wireguard ipsec; do
    if [ $what != none ]; then
        for cluster in alpha beta; do
            quietly clustermesh lab encrypt $lab/$cluster clusters --with $what $wait || fail "$cluster does not take $what"
        done
        encrypted $what || fail "nodes are not encrypted to by $what"
    fi
    for round in $(seq "$rounds"); do
        routes $what || fail "no route"
        if [ $what = ipsec ]; then quietly esp $a add && quietly esp $b add || fail "no ESP tunnel"; fi
        measure $what bare "/usr/bin/ip netns exec bare-a" 198.18.2.2 198.18.2.2
        if [ $what = ipsec ]; then quietly esp $a delete && quietly esp $b delete || fail "the ESP tunnel stays"; fi
        before=$(sent $what)
        measure $what mesh "clustermesh lab exec --lab $lab alpha/bench/client --" "$server" "$pong"
        [ $what = none ] || [ "$(sent $what)" -gt $((before + 1000000)) ] || fail "$what did not carry what was measured"
    done
done
clustermesh lab down $lab >/dev/null 2>&1
ip netns delete bare-a
ip netns delete bare-b
echo "PASS  encryption: $rounds rounds"

// SPDX-License-Identifier: Apache-2.0 OR MIT
//
// The steering program: which packets of a port are ours, and which the kernel's.
//
// It runs for every packet that a port receives, before the kernel has made anything of it, and it only ever
// decides: no byte is changed here. What is ours goes to the AF_XDP socket of the queue that it came in by; all
// else passes, so SSH, BGP, ARP, DHCP and the like never notice. The order of judgement is the order of
// towpath_steer() below, and steer/reference.rs holds the same order once more in Rust, against which this one is
// tested.
//
// Two rules are kept everywhere:
// * A packet that needs translation is never passed on. If nobody can take it (no socket, no live worker), it
//   is dropped and counted. Only traffic that is merely routed to pods falls back to the kernel's routing.
// * What cannot be read is judged by what can be: a header that contradicts itself is for the pipeline to name
//   (if the address is ours) or for the kernel to drop.
//
// Addresses are 16 bytes in network order, IPv4 as ::ffff:a.b.c.d (RFC 4291 section 2.5.5.2), so that one map
// serves both families. Rebuild with scripts/steer after a change; the object is committed beside this file.

#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>
#include <stddef.h>

// Socket of (port, queue) is at port * QUEUES_PER_PORT + queue. steer.rs knows the same number.
#define QUEUES_PER_PORT 64
// Longest chain of IPv6 extension headers that is followed to find a port.
#define MAX_EXTENSIONS 8

// ICMP types, RFC 792 and RFC 4443; <linux/icmp.h> drags in headers of the host's libc.
#define ICMP_ECHOREPLY 0
#define ICMP_DEST_UNREACH 3
#define ICMP_SOURCE_QUENCH 4
#define ICMP_REDIRECT 5
#define ICMP_TIME_EXCEEDED 11
#define ICMP_PARAMETERPROB 12
// Before the packet that an error quotes, RFC 792 and RFC 4443 section 2.1.
#define ICMP_HEADER_LEN 8
#define ICMPV6_ERROR_FIRST 1
#define ICMPV6_ERROR_LAST 4
#define ICMPV6_INFORMATION 128 // every type below is an error, RFC 4443 section 2.1
#define ICMPV6_ECHO_REPLY 129
#define ICMPV6_DISCOVERY_FIRST 133
#define ICMPV6_DISCOVERY_LAST 137

// Flags of an entry of `addresses`.
#define ADDRESS_VIP 1    // belongs to a Service: every packet is ours
#define ADDRESS_LOCAL 2  // the gateway's own: only some ports are ours
#define ADDRESS_SERVES 4 // local, with NodePorts or a masquerade range: fragments and ICMP errors may be ours

// Flags of an entry of `prefixes`, which hold for the whole prefix (steer.rs spreads them to longer ones).
#define PREFIX_DESTINATION 1 // routed by us; without a live worker the kernel may route it
#define PREFIX_SOURCE 2      // replies of endpoints, and pods on their way out: may need translation
#define PREFIX_SERVICE 4     // a Service range as destination: never for the kernel

enum counter {
	PASS_NOT_IP,      // ARP, LLDP, anything that is neither IPv4 nor IPv6
	PASS_SHORT,       // too short for an IP header
	PASS_GROUP,       // broadcast, multicast, link-local
	PASS_NEIGHBOR,    // neighbor and router discovery
	PASS_LOCAL,       // to the gateway itself
	PASS_OTHER,       // neither to nor from anything of ours
	PASS_PLAIN,       // routed to pods by the kernel, for want of a live worker
	REDIRECT_VIP,     // to a worker: Service address
	REDIRECT_LOCAL,   // to a worker: NodePort, host port, masquerade range of a local address
	REDIRECT_ROUTED,  // to a worker: destination in one of our prefixes
	REDIRECT_SOURCE,  // to a worker: source in one of our prefixes
	REDIRECT_ERROR,   // to a worker: an ICMP error among strangers about a packet to an endpoint
	DROP_WORKER_DEAD, // ours, but the worker of the queue has not been heard of for too long
	DROP_NO_SOCKET,   // ours, but no worker serves the queue
	COUNTERS,
};

struct address {
	__u32 word[4];
};

struct address_entry {
	__u16 flags;
	__u16 snat_first; // masquerade range, host order; empty if snat_first > snat_last
	__u16 snat_last;
	__u16 reserved;
};

struct local_port {
	struct address address;
	__be16 port;
	__u8 protocol;
	__u8 reserved;
};

struct prefix {
	__u32 length; // in bits of the 16-byte form
	struct address address;
};

// One cache line a worker, so that workers do not share one.
struct heartbeat {
	__u64 monotonic_ns;
	__u64 reserved[7];
};

struct {
	__uint(type, BPF_MAP_TYPE_XSKMAP);
	__uint(max_entries, 16 * QUEUES_PER_PORT);
	__type(key, __u32);
	__type(value, __u32);
} sockets SEC(".maps");

// Interface index to port index.
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16);
	__type(key, __u32);
	__type(value, __u32);
} ports SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1024);
	__type(key, struct address);
	__type(value, struct address_entry);
} addresses SEC(".maps");

// NodePorts and host ports of local addresses.
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1024);
	__type(key, struct local_port);
	__type(value, __u32);
} local_ports SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(max_entries, 1024);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct prefix);
	__type(value, __u32);
} prefixes SEC(".maps");

// Indexed by queue, which is the worker. The workers have it mapped and write to it.
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, QUEUES_PER_PORT);
	__uint(map_flags, BPF_F_MMAPABLE);
	__type(key, __u32);
	__type(value, struct heartbeat);
} heartbeats SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, COUNTERS);
	__type(key, __u32);
	__type(value, __u64);
} counters SEC(".maps");

// A worker that has not been heard of for this long is dead. Shorter gaps, such as a restart of the data plane,
// are ridden out by the receive ring.
const volatile __u64 heartbeat_max_ns = 1000000000;

static __always_inline void count(__u32 counter)
{
	__u64 *value = bpf_map_lookup_elem(&counters, &counter);

	if (value)
		*value += 1;
}

static __always_inline int pass(enum counter cause)
{
	count(cause);
	return XDP_PASS;
}

// To the socket of this port and queue. `plain`: the packet needs no translation, so without a live worker the
// kernel may route it; every other packet is dropped then.
static __always_inline int redirect(struct xdp_md *ctx, enum counter cause, int plain)
{
	__u32 queue = ctx->rx_queue_index, ifindex = ctx->ingress_ifindex;
	struct heartbeat *heartbeat;
	__u32 *port;

	port = bpf_map_lookup_elem(&ports, &ifindex);
	if (!port || queue >= QUEUES_PER_PORT)
		goto no_socket;

	heartbeat = bpf_map_lookup_elem(&heartbeats, &queue);
	if (!heartbeat)
		goto no_socket;
	// Signed: a worker on another core may have written a moment after this core read its clock.
	if ((__s64)(bpf_ktime_get_ns() - *(volatile __u64 *)&heartbeat->monotonic_ns) >
	    (__s64)heartbeat_max_ns) {
		if (plain)
			return pass(PASS_PLAIN);
		count(DROP_WORKER_DEAD);
		return XDP_DROP;
	}
	if (bpf_redirect_map(&sockets, *port * QUEUES_PER_PORT + queue, XDP_DROP) == XDP_REDIRECT) {
		count(cause);
		return XDP_REDIRECT;
	}
no_socket:
	if (plain)
		return pass(PASS_PLAIN);
	count(DROP_NO_SOCKET);
	return XDP_DROP;
}

static __always_inline int port_is_ours(const struct address *address, const struct address_entry *entry,
					__u8 protocol, __be16 port_be)
{
	struct local_port key = { .address = *address, .port = port_be, .protocol = protocol };
	__u16 port = bpf_ntohs(port_be);

	if (port >= entry->snat_first && port <= entry->snat_last)
		return 1;
	return bpf_map_lookup_elem(&local_ports, &key) != NULL;
}

// What follow_extensions() came to.
enum chain {
	CHAIN_ENDS,     // at the header that the IP packet is about
	CHAIN_FRAGMENT, // at a real fragment header, not an atomic one (RFC 6946)
	CHAIN_CUT,      // the packet is too short
};

// Moves `offset` and `protocol` from the first IPv6 extension header to what comes behind them, RFC 8200 section 4.
// Bounded: what hides behind more headers is the kernel's.
static __always_inline enum chain follow_extensions(struct xdp_md *ctx, __u32 *offset, __u32 *protocol)
{
	__u8 head[8];

	for (int i = 0; i < MAX_EXTENSIONS; i++) {
		if (*protocol != IPPROTO_HOPOPTS && *protocol != IPPROTO_ROUTING &&
		    *protocol != IPPROTO_DSTOPTS && *protocol != IPPROTO_FRAGMENT)
			break;
		if (bpf_xdp_load_bytes(ctx, *offset, head, sizeof(head)))
			return CHAIN_CUT;
		if (*protocol == IPPROTO_FRAGMENT) {
			// Offset or more-fragments set.
			if (head[2] || (head[3] & 0xf9))
				return CHAIN_FRAGMENT;
			*offset += 8;
		} else {
			*offset += 8 + 8 * (__u32)head[1];
		}
		*protocol = head[0];
	}
	return CHAIN_ENDS;
}

// True if a packet to a local address is ours. `offset`: of the header after the IP header; `protocol`: what that
// header is. Slow path: everything is read through a helper, wherever in the frame it lies.
static __always_inline int local_is_ours(struct xdp_md *ctx, const struct address *address,
					 const struct address_entry *entry, __u32 offset, __u32 protocol,
					 __u32 is_v6)
{
	int serves = entry->flags & ADDRESS_SERVES;
	__u8 head[8];

	if (is_v6) {
		enum chain chain = follow_extensions(ctx, &offset, &protocol);

		if (chain != CHAIN_ENDS)
			return chain == CHAIN_FRAGMENT && serves;
	}

	switch (protocol) {
	case IPPROTO_TCP:
	case IPPROTO_UDP:
	case IPPROTO_SCTP:
		// All three begin with source port, destination port.
		if (bpf_xdp_load_bytes(ctx, offset, head, 4))
			return 0;
		return port_is_ours(address, entry, protocol, *(__be16 *)&head[2]);
	case IPPROTO_ICMP:
		if (is_v6 || bpf_xdp_load_bytes(ctx, offset, head, 8))
			return 0;
		// The identifier of an echo stands where the port of a query's source stood (RFC 5508 section 3.1).
		if (head[0] == ICMP_ECHOREPLY) {
			__u16 id = bpf_ntohs(*(__be16 *)&head[4]);
			return id >= entry->snat_first && id <= entry->snat_last;
		}
		// Source quench and redirect concern the gateway's own routing, if anybody's.
		return serves && (head[0] == ICMP_DEST_UNREACH || head[0] == ICMP_TIME_EXCEEDED ||
				  head[0] == ICMP_PARAMETERPROB);
	case IPPROTO_ICMPV6:
		if (!is_v6 || bpf_xdp_load_bytes(ctx, offset, head, 8))
			return 0;
		if (head[0] == ICMPV6_ECHO_REPLY) {
			__u16 id = bpf_ntohs(*(__be16 *)&head[4]);
			return id >= entry->snat_first && id <= entry->snat_last;
		}
		return serves && head[0] >= ICMPV6_ERROR_FIRST && head[0] <= ICMPV6_ERROR_LAST;
	}
	return 0;
}

static __always_inline __u32 prefix_flags(const struct address *address)
{
	struct prefix key = { .length = 128, .address = *address };
	__u32 *flags = bpf_map_lookup_elem(&prefixes, &key);

	return flags ? *flags : 0;
}

// True for an ICMP error about a packet to an endpoint. It is to be translated like the packet was, whoever sent it:
// a node or a router on the way is in none of our tables, and neither is the client that it goes to. (An error about
// the other direction goes to the Service's address.) Only addresses are read here, which stand at fixed places in
// the quoted header. `offset` and `protocol` as for local_is_ours().
static __always_inline int is_about_endpoint(struct xdp_md *ctx, __u32 offset, __u32 protocol, __u32 is_v6)
{
	struct address destination = {};
	__u8 type;

	if (is_v6 && follow_extensions(ctx, &offset, &protocol) != CHAIN_ENDS)
		return 0;
	if (protocol != (is_v6 ? IPPROTO_ICMPV6 : IPPROTO_ICMP) ||
	    bpf_xdp_load_bytes(ctx, offset, &type, sizeof(type)))
		return 0;
	offset += ICMP_HEADER_LEN;
	if (is_v6) {
		if (type >= ICMPV6_INFORMATION ||
		    bpf_xdp_load_bytes(ctx, offset + offsetof(struct ipv6hdr, daddr), &destination,
				       sizeof(destination)))
			return 0;
	} else {
		if (type != ICMP_DEST_UNREACH && type != ICMP_SOURCE_QUENCH && type != ICMP_REDIRECT &&
		    type != ICMP_TIME_EXCEEDED && type != ICMP_PARAMETERPROB)
			return 0;
		if (bpf_xdp_load_bytes(ctx, offset + offsetof(struct iphdr, daddr), &destination.word[3], 4))
			return 0;
		destination.word[2] = bpf_htonl(0xffff);
	}
	return (prefix_flags(&destination) & PREFIX_SOURCE) != 0;
}

SEC("xdp.frags")
int towpath_steer(struct xdp_md *ctx)
{
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end, *next;
	struct address source = {}, destination = {};
	__u32 offset, protocol, is_v6, fragment = 0, destination_flags, source_flags, plain = 0;
	int about_endpoint;
	struct address_entry *entry;
	struct ethhdr *ethernet = data;
	enum counter cause;
	__be16 type;

	next = ethernet + 1;
	if (next > end)
		return pass(PASS_SHORT);
	type = ethernet->h_proto;

	// One tag (802.1Q) or two (802.1ad, or 802.1Q twice).
	for (int i = 0; i < 2; i++) {
		struct vlan_tag {
			__be16 control;
			__be16 type;
		} *tag = next;

		if (type != bpf_htons(ETH_P_8021Q) && type != bpf_htons(ETH_P_8021AD))
			break;
		next = tag + 1;
		if (next > end)
			return pass(PASS_SHORT);
		type = tag->type;
	}

	if (type == bpf_htons(ETH_P_IP)) {
		struct iphdr *ip = next;
		__u32 first, second;

		if ((void *)(ip + 1) > end)
			return pass(PASS_SHORT);
		first = ip->daddr & 0xff;
		second = ip->daddr >> 8 & 0xff;
		if ((first >= 224 && first < 240) || ip->daddr == 0xffffffff || (first == 169 && second == 254))
			return pass(PASS_GROUP);
		source.word[2] = destination.word[2] = bpf_htonl(0xffff);
		source.word[3] = ip->saddr;
		destination.word[3] = ip->daddr;
		is_v6 = 0;
		protocol = ip->protocol;
		fragment = ip->frag_off & bpf_htons(0x3fff); // more-fragments and offset, RFC 791
		offset = (__u32)(next - data) + ip->ihl * 4;
	} else if (type == bpf_htons(ETH_P_IPV6)) {
		struct ipv6hdr *ip = next;

		if ((void *)(ip + 1) > end)
			return pass(PASS_SHORT);
		__builtin_memcpy(&source, &ip->saddr, sizeof(source));
		__builtin_memcpy(&destination, &ip->daddr, sizeof(destination));
		if ((destination.word[0] & bpf_htonl(0xff000000)) == bpf_htonl(0xff000000) ||
		    (destination.word[0] & bpf_htonl(0xffc00000)) == bpf_htonl(0xfe800000))
			return pass(PASS_GROUP);
		is_v6 = 1;
		protocol = ip->nexthdr;
		offset = (__u32)(next - data) + sizeof(*ip);
		// Only with a hop limit of 255 are they discovery and not somebody's tunnel
		// under our rules (RFC 4861 section 6.1.1 and after).
		if (protocol == IPPROTO_ICMPV6 && ip->hop_limit == 255) {
			__u8 *message = (void *)(ip + 1);

			if ((void *)(message + 1) <= end && *message >= ICMPV6_DISCOVERY_FIRST &&
			    *message <= ICMPV6_DISCOVERY_LAST)
				return pass(PASS_NEIGHBOR);
		}
	} else {
		return pass(PASS_NOT_IP);
	}
	// A frame to a group of hosts is never forwarded (RFC 1812 section 5.3.4), whatever address is inside.
	if (ethernet->h_dest[0] & 1)
		return pass(PASS_GROUP);

	entry = bpf_map_lookup_elem(&addresses, &destination);
	if (entry && (entry->flags & ADDRESS_LOCAL)) {
		int ours = fragment ? (entry->flags & ADDRESS_SERVES) != 0 :
				      local_is_ours(ctx, &destination, entry, offset, protocol, is_v6);

		if (!ours)
			return pass(PASS_LOCAL);
		cause = REDIRECT_LOCAL;
	} else if (entry) {
		cause = REDIRECT_VIP;
	} else {
		destination_flags = prefix_flags(&destination) & (PREFIX_DESTINATION | PREFIX_SERVICE);
		source_flags = destination_flags & PREFIX_SERVICE ? 0 : prefix_flags(&source) & PREFIX_SOURCE;
		about_endpoint = !(destination_flags & PREFIX_SERVICE) && !source_flags && !fragment &&
				 is_about_endpoint(ctx, offset, protocol, is_v6);
		if (destination_flags)
			cause = REDIRECT_ROUTED;
		else if (source_flags)
			cause = REDIRECT_SOURCE;
		else if (about_endpoint)
			cause = REDIRECT_ERROR;
		else
			return pass(PASS_OTHER);
		plain = destination_flags == PREFIX_DESTINATION && !source_flags && !about_endpoint;
	}
	return redirect(ctx, cause, plain);
}

// No helper used here asks for a GPL program.
char LICENSE[] SEC("license") = "Apache-2.0 OR MIT";

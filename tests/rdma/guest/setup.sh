#!/bin/bash
# Second stage, in the host's root: network, Soft-RoCE devices, the command.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
exec >> /run/control/output 2>&1
hostname rdma-guest
ip link set lo up
# Two "NICs" on a bridge, each the end of a veth pair with an address and an rxe device. Soft-RoCE of this kernel works
# in the first network namespace only, so both are in it, and the kernel would send from one to the other over lo, where
# rxe never sees it: a rule for each device makes its traffic leave through it, accept_local lets the other one take it.
echo 0 > /proc/sys/net/ipv4/conf/all/rp_filter
echo 0 > /proc/sys/net/ipv4/conf/default/rp_filter
echo 1 > /proc/sys/net/ipv4/conf/default/accept_local
{
  echo "link add bridge0 mtu 4200 type bridge stp_state 0 forward_delay 0"
  echo "link set bridge0 up"
  for i in 0 1; do
    address=10.77.0.$((i + 1))
    table=$((100 + i))
    echo "link add nic$i address 02:00:00:00:00:0$i mtu 4200 type veth peer name port$i mtu 4200"
    echo "link set port$i master bridge0 up"
    echo "link set nic$i up"
    echo "addr add $address/24 dev nic$i"
    echo "route add 10.77.0.0/24 dev nic$i src $address table $table"
    echo "route add local $address/32 dev nic$i table $table"
    echo "rule add pref $((10 + i)) oif nic$i lookup $table"
  done
  # Known from the start: rxe drops packets while the kernel asks for an address.
  echo "neigh add 10.77.0.2 lladdr 02:00:00:00:00:01 dev nic0 nud permanent"
  echo "neigh add 10.77.0.1 lladdr 02:00:00:00:00:00 dev nic1 nud permanent"
  # The rule for local addresses has to come behind those.
  echo "rule add pref 1000 lookup local"
  echo "rule del pref 0"
} | ip -batch - || exit 1
for i in 0 1; do
  rdma link add rxe$i type rxe netdev nic$i || exit 1
done
ulimit -l unlimited
touch /run/control/begun
bash /run/control/command < /dev/null
echo $? > /run/control/status

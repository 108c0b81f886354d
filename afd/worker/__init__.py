"""What attention and FFN workers share: their place in the cluster, their mesh, their threads."""

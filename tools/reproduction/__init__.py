"""What a reproduction of the published figures does: protocol, clips, scores, report."""

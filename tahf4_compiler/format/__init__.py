"""HiFloat4: conversion, the search of scales, and the transforms before it."""
